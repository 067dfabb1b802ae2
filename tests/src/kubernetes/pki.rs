//! The cluster's certificate authority: keys, certificates and kubeconfig files of all parts, made anew for each cluster.

use super::{API_SERVER, FIRST_SERVICE, HOST, RUN};
use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::fs;
use std::path::{Path, PathBuf};

/// Folder of all files made here.
pub(super) fn folder() -> PathBuf {
    Path::new(RUN).join("pki")
}

/// Makes the files of a cluster whose kube nodes have these names and addresses.
pub(super) fn write(kube_nodes: &[(String, String)]) -> Result<()> {
    fs::create_dir_all(folder())?;
    let authority = Authority::new()?;
    let local = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "127.0.0.1",
    ];
    let names: Vec<&str> = local.into_iter().chain([HOST, FIRST_SERVICE]).collect();
    authority.issue("apiserver", "kube-apiserver", None, &names)?;
    authority.issue(
        "kubelet-client",
        "apiserver-kubelet",
        Some("system:masters"),
        &[],
    )?;
    for (file, user, group) in [
        ("admin", "admin", Some("system:masters")),
        (
            "kube-controller-manager",
            "system:kube-controller-manager",
            None,
        ),
        ("kube-scheduler", "system:kube-scheduler", None),
        ("kube-proxy", "system:kube-proxy", None),
    ] {
        authority.issue(file, user, group, &[])?;
        kubeconfig(file)?;
    }
    for (name, address) in kube_nodes {
        authority.issue(
            name,
            &format!("system:node:{name}"),
            Some("system:nodes"),
            &[name, address, "127.0.0.1"],
        )?;
        kubeconfig(name)?;
    }
    let signer = KeyPair::generate()?;
    fs::write(
        folder().join("service-accounts.key"),
        signer.serialize_pem(),
    )?;
    fs::write(
        folder().join("service-accounts.pub"),
        signer.public_key_pem(),
    )?;
    Ok(())
}

struct Authority(Issuer<'static, KeyPair>);

impl Authority {
    fn new() -> Result<Self> {
        let mut params = CertificateParams::new([])?;
        params
            .distinguished_name
            .push(DnType::CommonName, "collab-test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        fs::write(folder().join("ca.crt"), params.self_signed(&key)?.pem())?;
        fs::write(folder().join("ca.key"), key.serialize_pem())?;
        Ok(Self(Issuer::new(params, key)))
    }

    /// Writes a key and a certificate of `user`; with `names` it is a server's as well.
    fn issue(&self, file: &str, user: &str, group: Option<&str>, names: &[&str]) -> Result<()> {
        let mut params =
            CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params
                .distinguished_name
                .push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let key = KeyPair::generate()?;
        fs::write(
            folder().join(format!("{file}.crt")),
            params.signed_by(&key, &self.0)?.pem(),
        )?;
        fs::write(folder().join(format!("{file}.key")), key.serialize_pem())?;
        Ok(())
    }
}

fn kubeconfig(file: &str) -> Result<()> {
    let text = format!(
        "apiVersion: v1
kind: Config
clusters: [{{name: collab, cluster: {{server: \"{API_SERVER}\", certificate-authority: ca.crt}}}}]
users: [{{name: {file}, user: {{client-certificate: {file}.crt, client-key: {file}.key}}}}]
contexts: [{{name: collab, context: {{cluster: collab, user: {file}}}}}]
current-context: collab
"
    );
    Ok(fs::write(
        folder().join(format!("{file}.kubeconfig")),
        text,
    )?)
}
