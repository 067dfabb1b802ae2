//! Writes an image of one layer as an archive in OCI layout (image-spec 1.0), which `ctr images import` reads.

use anyhow::Result;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::path::Path;

/// How a container of the image is started.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Config {
    /// Program and first arguments.
    pub entrypoint: Vec<String>,
    /// Arguments that a pod's `args` replace.
    pub cmd: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// `UID:GID`.
    pub user: String,
}

impl Config {
    /// The configuration blob of an image with the layer `diff_id`.
    pub(super) fn document(&self, diff_id: &str) -> String {
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_string();
        let env: Vec<&String> = std::iter::once(&path)
            .filter(|_| {
                !self
                    .env
                    .iter()
                    .any(|variable| variable.starts_with("PATH="))
            })
            .chain(&self.env)
            .collect();
        let config =
            json!({"Entrypoint": self.entrypoint, "Cmd": self.cmd, "Env": env, "User": self.user});
        json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        })
        .to_string()
    }
}

/// Writes the archive of the image `reference`, whose content is the tar `layer`.
pub(super) fn write(archive: &Path, reference: &str, layer: &Path, config: &Config) -> Result<()> {
    let layer_digest = digest(File::open(layer)?)?;
    let layer_bytes = layer.metadata()?.len();
    let config = config.document(&layer_digest);
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", &config)?,
        "layers": [descriptor("layer.v1.tar", &layer_digest, layer_bytes)],
    })
    .to_string();
    let mut index_entry = blob("manifest.v1+json", &manifest)?;
    index_entry["annotations"] = json!({"io.containerd.image.name": reference});
    let index = json!({"schemaVersion": 2, "manifests": [index_entry]}).to_string();

    let mut tar = tar::Builder::new(File::create(archive)?);
    let mut put = |path: &str, size: u64, content: &mut dyn std::io::Read| {
        let mut header = tar::Header::new_gnu();
        header.set_size(size);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, content)
    };
    let blob_path = |digest: &str| format!("blobs/{}", digest.replace(':', "/"));
    for (path, text) in [
        (
            "oci-layout".to_string(),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        ),
        ("index.json".to_string(), &index),
        (blob_path(&digest(config.as_bytes())?), &config),
        (blob_path(&digest(manifest.as_bytes())?), &manifest),
    ] {
        put(&path, text.len() as u64, &mut text.as_bytes())?;
    }
    put(
        &blob_path(&layer_digest),
        layer_bytes,
        &mut File::open(layer)?,
    )?;
    Ok(tar.finish()?)
}

fn blob(kind: &str, text: &str) -> Result<serde_json::Value> {
    Ok(descriptor(
        kind,
        &digest(text.as_bytes())?,
        text.len() as u64,
    ))
}

fn descriptor(kind: &str, digest: &str, size: u64) -> serde_json::Value {
    json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": size})
}

fn digest(mut content: impl std::io::Read) -> Result<String> {
    let mut hash = Sha256::new();
    std::io::copy(&mut content, &mut hash)?;
    Ok(format!("sha256:{:x}", hash.finalize()))
}
