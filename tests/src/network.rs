//! Machines of a test: network namespaces on one bridge, inside a [`Sandbox`](crate::sandbox), cut from each other by
//! dropping packets in one direction at a time.
//!
//! The program in the sandbox stands at the bridge's own address, reaches every host, and is never cut off. The bridge
//! and its hosts end with the sandbox, so a run that was killed leaves none of them.

use crate::command;
use anyhow::Result;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

/// RFC 2544: a network for tests.
const SUBNET: [u8; 3] = [198, 18, 1];
const BRIDGE: &str = "drills0";

/// Where processes run: a host of a [`Network`], or this machine's loopback.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Host {
    name: String,
    address: IpAddr,
    /// Whether it is a network namespace of this name.
    apart: bool,
}

impl Default for Host {
    fn default() -> Self {
        Self::local()
    }
}

impl Host {
    /// The loopback of whoever asks.
    pub fn local() -> Self {
        Self {
            name: "local".to_owned(),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            apart: false,
        }
    }

    /// Its address, for everybody on the network.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command whose program, to be given as the first argument, runs on this host; its process id is that of the command.
    pub fn command(&self) -> Command {
        if self.apart {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/run/netns/{}", self.name));
            command.arg("--");
            command
        } else {
            Command::new("env")
        }
    }
}

/// A bridge with hosts, and who cannot reach whom.
#[derive(Debug)]
pub struct Network {
    hosts: Mutex<Vec<Host>>,
    cuts: Mutex<BTreeSet<(Host, Host)>>,
}

impl Network {
    /// Makes the bridge. There is one network at a time.
    ///
    /// # Errors
    /// Outside a sandbox, or without the rights of root.
    pub fn new() -> Result<Self> {
        let [a, b, c] = SUBNET;
        ip(&format!("link add {BRIDGE} type bridge"))?;
        ip(&format!("addr add {a}.{b}.{c}.1/24 dev {BRIDGE}"))?;
        ip(&format!("link set {BRIDGE} up"))?;
        Ok(Self {
            hosts: Mutex::default(),
            cuts: Mutex::default(),
        })
    }

    /// The address of the bridge, at which this program can be reached by the hosts.
    pub fn here(&self) -> IpAddr {
        let [a, b, c] = SUBNET;
        IpAddr::V4(Ipv4Addr::new(a, b, c, 1))
    }

    /// Adds a host.
    ///
    /// # Errors
    /// When there is one of this name.
    ///
    /// # Panics
    /// With more than 200 hosts.
    pub fn host(&self, name: &str) -> Result<Host> {
        let mut hosts = self.hosts.lock().expect("no holder panics");
        let number = u8::try_from(hosts.len() + 10).expect("a handful of hosts");
        let [a, b, c] = SUBNET;
        let host = Host {
            name: name.to_owned(),
            address: IpAddr::V4(Ipv4Addr::new(a, b, c, number)),
            apart: true,
        };
        ip(&format!("netns add {name}"))?;
        ip(&format!(
            "link add v{name} type veth peer name eth0 netns {name}"
        ))?;
        ip(&format!("link set v{name} master {BRIDGE} up"))?;
        ip(&format!("-n {name} addr add {}/24 dev eth0", host.address))?;
        ip(&format!("-n {name} link set eth0 up"))?;
        ip(&format!("-n {name} link set lo up"))?;
        hosts.push(host.clone());
        Ok(host)
    }

    /// Drops what `from` sends to `to`, and nothing else.
    ///
    /// # Errors
    /// When the kernel refuses the rule.
    pub fn cut_one_way(&self, from: &Host, to: &Host) -> Result<()> {
        let mut cuts = self.cuts.lock().expect("no holder panics");
        if cuts.insert((from.clone(), to.clone())) {
            rule("-A", from, to, &[])?;
        }
        Ok(())
    }

    /// Drops everything between two hosts.
    ///
    /// # Errors
    /// As [`Network::cut_one_way`].
    pub fn cut(&self, one: &Host, other: &Host) -> Result<()> {
        self.cut_one_way(one, other)?;
        self.cut_one_way(other, one)
    }

    /// Lets everything through between two hosts again.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn heal(&self, one: &Host, other: &Host) -> Result<()> {
        let mut cuts = self.cuts.lock().expect("no holder panics");
        for (from, to) in [(one, other), (other, one)] {
            if cuts.remove(&(from.clone(), to.clone())) {
                rule("-D", from, to, &[])?;
            }
        }
        Ok(())
    }

    /// Takes all cuts back.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn heal_all(&self) -> Result<()> {
        for (from, to) in std::mem::take(&mut *self.cuts.lock().expect("no holder panics")) {
            rule("-D", &from, &to, &[])?;
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The next network of this sandbox uses the same names.
        for host in self.hosts.lock().expect("no holder panics").iter() {
            let _ = ip(&format!("link del v{}", host.name));
            let _ = ip(&format!("netns del {}", host.name));
        }
        let _ = ip(&format!("link del {BRIDGE}"));
    }
}

fn rule(action: &str, from: &Host, to: &Host, more: &[&str]) -> Result<()> {
    let mut rule = to.command();
    rule.args(["iptables", "-w", action, "INPUT", "-s"])
        .arg(from.address.to_string())
        .args(more)
        .args(["-j", "DROP"]);
    command::output(&mut rule).map(drop)
}

fn ip(arguments: &str) -> Result<()> {
    debug_assert!(Path::new("/run/netns").exists(), "in a sandbox");
    command::output(Command::new("ip").args(arguments.split(' '))).map(drop)
}
