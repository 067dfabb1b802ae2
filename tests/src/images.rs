//! The container images of the tests, made without a container engine from the same Dockerfiles that users build.
//!
//! Of a Dockerfile the last stage counts. Its base is made here: Debian by `mmdebstrap`, whose hooks are the stage's `RUN`
//! lines; the distroless base by laying the C library and the root certificates of this machine beside our binary.

mod dockerfile;
mod oci;

use crate::tools::{KUBERNETES, Tools};
use crate::{cache, command};
use anyhow::{Context, Result, bail, ensure};
use dockerfile::Stage;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

pub use oci::Config;

/// An image as an archive in OCI layout, and the name under which it is imported.
#[derive(Debug, Clone)]
pub struct Image {
    /// Name and tag, as a pod asks for it.
    pub reference: String,
    /// The archive.
    pub archive: PathBuf,
}

/// Name and tag under which the tests' image `name` is known: `collab-node`, `collab-operator`, `collab-postgres`,
/// `collab-redis`, `coredns` or `pause`.
pub fn reference(name: &str) -> String {
    format!("collab.test/{name}:e2e")
}

/// Makes all images; those whose inputs are unchanged are taken from the cache.
///
/// `binaries` is the folder with `collab-node` and `collab-operator`.
///
/// # Errors
/// When a Dockerfile says something that is not understood here, or a program that makes a part of an image fails.
pub fn build(tools: &Tools, binaries: &Path) -> Result<Vec<Image>> {
    let pause = compile_pause()?;
    Ok(vec![
        program("pause", &pause)?,
        program("coredns", tools.path("coredns"))?,
        from_dockerfile("redis", binaries)?,
        from_dockerfile("postgres", binaries)?,
        from_dockerfile("node", binaries)?,
        from_dockerfile("operator", binaries)?,
    ])
}

/// An image of one statically linked program, which it starts.
fn program(name: &str, binary: &Path) -> Result<Image> {
    let path = format!("/{name}");
    let config = Config {
        entrypoint: vec![path.clone()],
        user: "65532:65532".into(),
        ..Config::default()
    };
    // The cache names a program after all that it is made of.
    image(
        name,
        &[binary.as_os_str().as_encoded_bytes()],
        &config,
        |layer| {
            let mut layer = tar::Builder::new(File::create(layer)?);
            append(&mut layer, binary, &path)?;
            Ok(layer.finish()?)
        },
    )
}

fn from_dockerfile(name: &str, binaries: &Path) -> Result<Image> {
    let file = Path::new(KUBERNETES)
        .join("../../docker")
        .join(name)
        .join("Dockerfile");
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let stage = dockerfile::last_stage(&text).with_context(|| file.display().to_string())?;
    let name = format!("collab-{name}");
    match stage.base.split_once(':') {
        Some(("debian", release)) => {
            ensure!(
                stage.copies.is_empty(),
                "{name}: COPY onto Debian is not understood here"
            );
            let release = release.trim_end_matches("-slim");
            let inputs = [release.as_bytes(), stage.runs.join("\n").as_bytes()].concat();
            image(&name, &[&inputs], &stage.config, |layer| {
                debian(layer, release, &stage.runs)
            })
        }
        Some((base, _)) if base.contains("distroless/cc-") => {
            let inputs = stage
                .copies
                .iter()
                .map(|(_, path)| stripped(binaries, path))
                .collect::<Result<Vec<_>>>()?;
            let contents = inputs.iter().map(fs::read).collect::<Result<Vec<_>, _>>()?;
            let contents: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
            image(&name, &contents, &stage.config, |layer| {
                distroless(layer, &stage, &inputs)
            })
        }
        _ => bail!("{name}: base image {} is not understood here", stage.base),
    }
}

/// One image of one layer, made anew when `inputs` or its configuration are others.
fn image(
    name: &str,
    inputs: &[&[u8]],
    config: &Config,
    layer: impl FnOnce(&Path) -> Result<()>,
) -> Result<Image> {
    let configuration = config.document("");
    let mut inputs = inputs.to_vec();
    inputs.push(configuration.as_bytes());
    let folder = cache::folder()?.join("images").join(name);
    let archive = cache::entry(&folder, name, &inputs, |archive| {
        forget_others(&folder)?;
        let tar = archive.with_extension("layer");
        cache::remove(&tar)?;
        layer(&tar)?;
        oci::write(archive, &reference(name), &tar, config)?;
        cache::remove(&tar)
    })?;
    Ok(Image {
        reference: reference(name),
        archive,
    })
}

/// Removes the images made from earlier inputs: every change of the code makes one.
fn forget_others(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none() {
            cache::remove(&path)?;
        }
    }
    Ok(())
}

/// Writes Debian's root filesystem after the `RUN` lines as a tar.
fn debian(layer: &Path, release: &str, runs: &[String]) -> Result<()> {
    let mut bootstrap = Command::new("mmdebstrap");
    // The documents, manuals and translations that the slim image leaves out as well.
    bootstrap
        .args([
            "--quiet",
            "--mode=root",
            "--variant=minbase",
            "--format=tar",
        ])
        .args(
            ["doc", "info", "locale", "man"]
                .map(|part| format!("--dpkgopt=path-exclude=/usr/share/{part}/*")),
        );
    for (number, run) in runs.iter().enumerate() {
        let variable = format!("RUN_{number}");
        bootstrap
            .arg(format!(
                "--customize-hook=chroot \"$1\" sh -ec \"${variable}\""
            ))
            .env(&variable, run);
    }
    command::output(bootstrap.arg(release).arg(layer)).map(drop)
}

/// Writes the binaries, what they are linked to, the users and root certificates as a tar.
fn distroless(layer: &Path, stage: &Stage, binaries: &[PathBuf]) -> Result<()> {
    let mut layer = tar::Builder::new(File::create(layer)?);
    let mut libraries: Vec<String> = Vec::new();
    for (binary, (_, path)) in binaries.iter().zip(&stage.copies) {
        append(&mut layer, binary, path)?;
        let linked = command::output(Command::new("ldd").arg(binary))?;
        libraries.extend(
            linked
                .split_whitespace()
                .filter(|word| word.starts_with('/'))
                .map(str::to_string),
        );
    }
    libraries.sort();
    libraries.dedup();
    for library in libraries {
        append(&mut layer, &fs::canonicalize(&library)?, &library)?;
    }
    let certificates = "/etc/ssl/certs/ca-certificates.crt";
    append(&mut layer, Path::new(certificates), certificates)?;
    let passwd = "root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n";
    for (path, text) in [
        ("etc/passwd", passwd),
        ("etc/group", "root:x:0:\nnonroot:x:65532:\n"),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        layer.append_data(&mut header, path, text.as_bytes())?;
    }
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_size(0);
    header.set_mode(0o1777);
    layer.append_data(&mut header, "tmp/", std::io::empty())?;
    Ok(layer.finish()?)
}

/// Adds the file `source` as `path`, executable, owned by root, without times: the same file gives the same layer.
fn append(layer: &mut tar::Builder<File>, source: &Path, path: &str) -> Result<()> {
    let file = File::open(source).with_context(|| source.display().to_string())?;
    let mut header = tar::Header::new_gnu();
    header.set_size(file.metadata()?.len());
    header.set_mode(0o755);
    Ok(layer.append_data(&mut header, path.trim_start_matches('/'), file)?)
}

/// A copy without debug information of the binary that a Dockerfile copies to `path`.
fn stripped(binaries: &Path, path: &str) -> Result<PathBuf> {
    let name = Path::new(path)
        .file_name()
        .context("COPY to a folder is not understood here")?;
    let copy = binaries.join(name).with_extension("stripped");
    command::output(
        Command::new("strip")
            .arg("-o")
            .arg(&copy)
            .arg(binaries.join(name)),
    )?;
    Ok(copy)
}

fn compile_pause() -> Result<PathBuf> {
    let source = Path::new(KUBERNETES).join("pause.c");
    cache::entry(
        &cache::folder()?.join("tools"),
        "pause",
        &[&fs::read(&source)?],
        |binary| {
            command::output(
                Command::new("gcc")
                    .args(["-static", "-O2", "-s", "-x", "c", "-o"])
                    .arg(binary)
                    .arg(&source),
            )
            .map(drop)
        },
    )
}
