//! The programs of a real Kubernetes, built from the Go modules in `tests/kubernetes`, each of which pins all it is made of.

use crate::{cache, command};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Programs by name.
#[derive(Debug, Clone)]
pub struct Tools(BTreeMap<&'static str, PathBuf>);

/// The folder `tests/kubernetes` of this checkout.
pub const KUBERNETES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/kubernetes");

impl Tools {
    /// Builds what is not in the cache; minutes when nothing is, milliseconds when all is.
    ///
    /// # Errors
    /// When Go is missing or a build fails.
    pub fn build() -> Result<Self> {
        let compiler = command::output(Command::new("go").args(["env", "GOVERSION"]))
            .context("Go 1.26 is needed")?;
        let mut tools = BTreeMap::new();
        for module in MODULES {
            let folder = module.build(&compiler)?;
            tools.extend(
                module
                    .programs
                    .iter()
                    .map(|(program, _)| (*program, folder.join(program))),
            );
        }
        Ok(Self(tools))
    }

    /// Path of one of the programs built here.
    ///
    /// # Panics
    /// When no such program is built here.
    pub fn path(&self, program: &str) -> &Path {
        self.0
            .get(program)
            .unwrap_or_else(|| panic!("{program} is not one of {:?}", self.0.keys()))
    }
}

/// A folder in `tests/kubernetes` with `go.mod`, `go.sum` and an import of each program.
struct Module {
    name: &'static str,
    /// Programs and the Go packages they are built from.
    programs: &'static [(&'static str, &'static str)],
    /// `-X` flags for the linker: Kubernetes takes its version from them.
    variables: &'static [&'static str],
}

const MODULES: &[Module] = &[
    Module {
        name: "etcd",
        programs: &[("etcd", "go.etcd.io/etcd/server/v3")],
        variables: &[],
    },
    Module {
        name: "kubernetes",
        programs: &[
            ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
            (
                "kube-controller-manager",
                "k8s.io/kubernetes/cmd/kube-controller-manager",
            ),
            ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
            ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
            ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
            ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
        ],
        variables: &[
            "k8s.io/component-base/version.gitVersion=v1.34.4",
            "k8s.io/component-base/version.gitMajor=1",
            "k8s.io/component-base/version.gitMinor=34",
        ],
    },
    Module {
        name: "coredns",
        programs: &[("coredns", "github.com/coredns/coredns")],
        variables: &[],
    },
    Module {
        name: "helm3",
        programs: &[("helm3", "helm.sh/helm/v3/cmd/helm")],
        variables: &[],
    },
    Module {
        name: "helm4",
        programs: &[("helm4", "helm.sh/helm/v4/cmd/helm")],
        variables: &[],
    },
];

impl Module {
    fn build(&self, compiler: &str) -> Result<PathBuf> {
        let source = Path::new(KUBERNETES).join(self.name);
        let read = |file: &str| {
            fs::read(source.join(file)).with_context(|| format!("{}/{file}", source.display()))
        };
        let flags = self
            .variables
            .iter()
            .fold("-s -w".to_string(), |flags, variable| {
                format!("{flags} -X {variable}")
            });
        let inputs: [&[u8]; 5] = [
            &read("go.mod")?,
            &read("go.sum")?,
            &read("tools.go")?,
            flags.as_bytes(),
            compiler.as_bytes(),
        ];
        cache::entry(&cache::folder()?.join("tools"), self.name, &inputs, |out| {
            for (program, package) in self.programs {
                command::output(
                    Command::new("go")
                        .args([
                            "build",
                            "-trimpath",
                            "-tags=netgo",
                            "-ldflags",
                            &flags,
                            "-o",
                        ])
                        .arg(out.join(program))
                        .arg(package)
                        .current_dir(&source)
                        .env("CGO_ENABLED", "0")
                        // Neither another toolchain nor a workspace or vendor folder around us.
                        .envs([
                            ("GOTOOLCHAIN", "local"),
                            ("GOWORK", "off"),
                            ("GOFLAGS", "-mod=readonly -buildvcs=false"),
                        ]),
                )?;
            }
            Ok(())
        })
    }
}
