//! The right of one process to use a data folder.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::store::StoreError;

/// Held for as long as it lives.
#[derive(Debug)]
pub(super) struct FolderLock(File);

impl FolderLock {
    /// Takes the lock of `folder`, and makes the folder when it does not exist.
    ///
    /// # Errors
    /// [`StoreError::Unusable`] when the folder cannot be used, or another holds its lock.
    pub(super) fn take(folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join("collab.lock");
        let cannot = |error: std::io::Error| {
            StoreError::Unusable(format!(
                "cannot use the data folder {}: {error}",
                folder.display()
            ))
        };
        std::fs::create_dir_all(folder).map_err(cannot)?;
        let file = File::create(&path).map_err(cannot)?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(TryLockError::WouldBlock) => Err(StoreError::Unusable(format!(
                "the data folder {} is in use by another collab-node; stop that one, or give this one its own folder",
                folder.display()
            ))),
            Err(TryLockError::Error(error)) => Err(cannot(error)),
        }
    }
}

impl Drop for FolderLock {
    /// To close the file would not be enough: a process that another thread is just starting has it open as well, and
    /// with it the lock, until that process runs its own program (flock(2)).
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "the data folder stays locked until this process ends");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A folder of a test, which takes it away with it.
    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Self {
            Self(std::env::temp_dir().join(format!("collab-lock-{}", uuid::Uuid::new_v4())))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn one_holds_a_folder() {
        let folder = Folder::new();
        let held = FolderLock::take(&folder.0).unwrap();
        let refused = FolderLock::take(&folder.0).unwrap_err().to_string();
        assert!(
            refused.contains("is in use by another collab-node"),
            "{refused}"
        );
        drop(held);
        FolderLock::take(&folder.0).unwrap();
    }

    #[test]
    fn what_a_starting_process_has_open_does_not_hold_the_folder() {
        let folder = Folder::new();
        let held = FolderLock::take(&folder.0).unwrap();
        let of_a_child = held.0.try_clone().unwrap();
        drop(held);
        FolderLock::take(&folder.0).unwrap();
        drop(of_a_child);
    }
}
