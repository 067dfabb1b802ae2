//! Documents as files: `NAME.yjs`, one V1 update each, and for a backup `documents.jsonl`, which lists them.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use collab_core::ids::DocumentId;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_64;

/// The list of a backup, one [`Listed`] in JSON per line.
pub(super) const LIST: &str = "documents.jsonl";
/// A file name of a document is not longer than this: file systems end at 255 bytes.
const NAME_BYTES_MAX: usize = 200;

/// A line of the list of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listed {
    pub(super) id: DocumentId,
    /// Beside the list; `None`: the document was deleted, and this is its tombstone.
    pub(super) file: Option<String>,
    /// Of the file, in hex.
    pub(super) sha256: Option<String>,
}

impl Listed {
    pub(super) fn tombstone(id: &DocumentId) -> Self {
        Self {
            id: id.clone(),
            file: None,
            sha256: None,
        }
    }
}

/// Writes a document into a folder and answers how it is listed.
pub(super) fn write(folder: &Path, id: &DocumentId, state: &Bytes) -> io::Result<Listed> {
    let name = file_name(id);
    // Complete, or not there under its name.
    let part = folder.join(format!(".{name}.part"));
    let mut file = File::create(&part)?;
    file.write_all(state)?;
    file.sync_all()?;
    fs::rename(part, folder.join(&name))?;
    Ok(Listed {
        id: id.clone(),
        file: Some(name),
        sha256: Some(hex(&Sha256::digest(state))),
    })
}

/// Writes the list of a backup. Without it a folder is no backup: it comes last.
pub(super) fn write_list(folder: &Path, list: &[Listed]) -> io::Result<()> {
    let mut text = String::new();
    for listed in list {
        let line = serde_json::to_string(listed)?;
        let _ = writeln!(text, "{line}");
    }
    let part = folder.join(format!(".{LIST}.part"));
    let mut file = File::create(&part)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(part, folder.join(LIST))?;
    File::open(folder)?.sync_all()
}

/// Reads the list of a backup.
pub(super) fn read_list(folder: &Path) -> io::Result<Vec<Listed>> {
    let text = fs::read_to_string(folder.join(LIST))?;
    let lines = text.lines().map(|line| Ok(serde_json::from_str(line)?));
    lines.collect()
}

/// Reads a listed document. `None`: it is a tombstone.
pub(super) fn read(folder: &Path, listed: &Listed) -> io::Result<Option<Bytes>> {
    let Some(name) = &listed.file else {
        return Ok(None);
    };
    // A list from elsewhere must not lead out of its folder.
    let inside = Path::new(name)
        .file_name()
        .is_some_and(|file| file == name.as_str());
    if !inside {
        return Err(io::Error::other(format!(
            "{name} is not a file of the backup"
        )));
    }
    let state = fs::read(folder.join(name))?;
    if listed.sha256.as_deref() != Some(&hex(&Sha256::digest(&state))) {
        return Err(io::Error::other(format!(
            "{name} is not as it was backed up: its hash differs"
        )));
    }
    Ok(Some(state.into()))
}

/// The name of a document's file: its id, with `%` and two hexadecimal digits for what is not a letter, digit,
/// `-`, `_` or a dot inside. One that is too long is cut and told apart by its hash.
pub(super) fn file_name(id: &DocumentId) -> String {
    let mut name = String::new();
    for (at, byte) in id.as_str().bytes().enumerate() {
        if byte.is_ascii_alphanumeric() || b"-_".contains(&byte) || (byte == b'.' && 0 < at) {
            name.push(char::from(byte));
        } else {
            let _ = write!(name, "%{byte:02X}");
        }
    }
    if NAME_BYTES_MAX < name.len() {
        name.truncate(NAME_BYTES_MAX - 18);
        let _ = write!(name, "~{:016x}", xxh3_64(id.as_str().as_bytes()));
    }
    name + ".yjs"
}

/// The document that a file is named for. `None`: the name is none of [`file_name`], or was cut.
pub(super) fn document_of(path: &Path) -> Option<DocumentId> {
    let name = path.file_name()?.to_str()?.strip_suffix(".yjs")?;
    let mut bytes = Vec::new();
    let mut rest = name.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            bytes.push(u8::from_str_radix(str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    let id = DocumentId::new(str::from_utf8(&bytes).ok()?).ok()?;
    (file_name(&id) == format!("{name}.yjs")).then_some(id)
}

/// Where the rows of a document are kept before they are replaced.
pub(super) fn keep_rows(folder: &Path, id: &DocumentId, lines: &[String]) -> io::Result<PathBuf> {
    let path = folder.join(file_name(id) + ".rows");
    let mut file = File::create(&path)?;
    for line in lines {
        writeln!(file, "{line}")?;
    }
    file.sync_all()?;
    Ok(path)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_named_for_its_document() {
        for (id, name) in [
            ("minutes", "minutes.yjs"),
            ("team/2026 ä", "team%2F2026%20%C3%A4.yjs"),
            ("../etc/passwd", "%2E.%2Fetc%2Fpasswd.yjs"),
            (".hidden", "%2Ehidden.yjs"),
            ("a%2Fb", "a%252Fb.yjs"),
        ] {
            let id = DocumentId::new(id).unwrap();
            assert_eq!(file_name(&id), name);
            assert_eq!(document_of(Path::new(name)), Some(id));
        }
        let long = ["ä".repeat(127), "ä".repeat(126) + "b"].map(|id| DocumentId::new(&id).unwrap());
        let [one, other] = [file_name(&long[0]), file_name(&long[1])];
        assert!(one != other && one.len() < 255, "{one}");
        assert_eq!(document_of(Path::new(&one)), None);
        assert_eq!(document_of(Path::new("notes.txt")), None);
    }

    #[test]
    fn what_was_changed_or_leads_elsewhere_is_not_read() {
        let folder = std::env::temp_dir().join(format!("collab-files-{}", uuid::Uuid::new_v4()));
        fs::create_dir_all(&folder).unwrap();
        let id = DocumentId::new("minutes").unwrap();
        let listed = write(&folder, &id, &Bytes::from_static(b"\0\0")).unwrap();
        write_list(&folder, &[listed.clone(), Listed::tombstone(&id)]).unwrap();
        assert_eq!(
            read_list(&folder).unwrap(),
            [listed.clone(), Listed::tombstone(&id)]
        );
        assert_eq!(read(&folder, &listed).unwrap().unwrap(), b"\0\0".as_slice());
        fs::write(folder.join("minutes.yjs"), b"\0\x01").unwrap();
        assert!(read(&folder, &listed).is_err());
        let elsewhere = Listed {
            file: Some("../minutes.yjs".to_owned()),
            ..listed
        };
        assert!(read(&folder, &elsewhere).is_err());
        fs::remove_dir_all(folder).unwrap();
    }
}
