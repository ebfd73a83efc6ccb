//! etcd, kube-apiserver and kube-controller-manager: the same for both profiles, apart from network and addresses.

use std::net::TcpListener;
use std::path::PathBuf;

use anyhow::Result;

use crate::cluster::Cluster;
use crate::lifecycle::Build;
use crate::paths::{Profile, bin};
use crate::process::Daemon;

/// Where the control plane listens.
pub(crate) struct Addresses {
    /// Network namespace, or the machine's own.
    pub(crate) netns: Option<PathBuf>,
    /// Address that the API server listens on and tells others.
    pub(crate) bind: &'static str,
    pub(crate) advertise: &'static str,
    pub(crate) api_port: u16,
    pub(crate) etcd_port: u16,
    pub(crate) etcd_peer_port: u16,
}

/// The Services' addresses. The first is the API server's own.
pub(crate) const SERVICES: &str = "10.96.0.0/16";

/// The control plane on the loopback interface of the machine.
pub(crate) fn start_alone(build: &mut Build) -> Result<Cluster> {
    let [api_port, etcd_port, etcd_peer_port] = free_ports()?;
    let addresses = Addresses {
        netns: None,
        bind: "127.0.0.1",
        advertise: "127.0.0.1",
        api_port,
        etcd_port,
        etcd_peer_port,
    };
    build.pki.kubeconfig(
        "admin",
        &format!("https://127.0.0.1:{api_port}"),
        &Profile::ControlPlane.kubeconfig(),
    )?;
    let cluster = start(build, &addresses)?;
    controllers_ready(build, &cluster)?;
    Ok(cluster)
}

/// Ports that are free now. All are held until the last is found, so that they differ.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let listeners = (0..N).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<Vec<_>, _>>()?;
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}

/// Starts the control plane and waits until the API server answers through the host's kubeconfig, which must exist already.
pub(crate) fn start(build: &mut Build, at: &Addresses) -> Result<Cluster> {
    let data = build.profile.data();
    let cluster = Cluster::managed(build.profile);
    let client = format!("http://127.0.0.1:{}", at.etcd_port);
    let peer = format!("http://127.0.0.1:{}", at.etcd_peer_port);
    let etcd = vec![
        format!("--data-dir={}", data.join("etcd").display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // The data lives as long as the cluster, so nothing is lost by not waiting for the disk.
        "--unsafe-no-fsync".into(),
        "--log-level=warn".into(),
    ];
    build.start(Daemon { netns: at.netns.clone(), ..Daemon::new("etcd", &bin("etcd"), etcd) })?;

    let pki = |file: &str| build.pki.path(file);
    let apiserver = vec![
        format!("--etcd-servers={client}"),
        format!("--bind-address={}", at.bind),
        format!("--advertise-address={}", at.advertise),
        format!("--secure-port={}", at.api_port),
        format!("--service-cluster-ip-range={SERVICES}"),
        format!("--cert-dir={}", data.display()),
        format!("--client-ca-file={}", pki("ca.crt")),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        format!("--kubelet-certificate-authority={}", pki("ca.crt")),
        format!("--kubelet-client-certificate={}", pki("apiserver-kubelet.crt")),
        format!("--kubelet-client-key={}", pki("apiserver-kubelet.key")),
        // Otherwise logs and exec wait for a name server that knows the node's name.
        "--kubelet-preferred-address-types=InternalIP".into(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
        format!("--service-account-key-file={}", pki("service-account.crt")),
        format!("--service-account-signing-key-file={}", pki("service-account.key")),
        format!("--requestheader-client-ca-file={}", pki("front-proxy-ca.crt")),
        "--requestheader-allowed-names=front-proxy".into(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
        "--requestheader-group-headers=X-Remote-Group".into(),
        "--requestheader-username-headers=X-Remote-User".into(),
        format!("--proxy-client-cert-file={}", pki("front-proxy.crt")),
        format!("--proxy-client-key-file={}", pki("front-proxy.key")),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged=true".into(),
    ];
    let controller_kubeconfig = data.join("controller-manager.kubeconfig");
    let local = format!("https://127.0.0.1:{}", at.api_port);
    build.pki.kubeconfig("controller-manager", &local, &controller_kubeconfig)?;
    let controllers = vec![
        format!("--kubeconfig={}", controller_kubeconfig.display()),
        format!("--service-account-private-key-file={}", pki("service-account.key")),
        format!("--root-ca-file={}", pki("ca.crt")),
        format!("--cluster-signing-cert-file={}", pki("ca.crt")),
        format!("--cluster-signing-key-file={}", pki("ca.key")),
        "--use-service-account-credentials=true".into(),
        "--leader-elect=false".into(),
        "--allocate-node-cidrs=false".into(),
        // Nobody asks it for health or metrics, and two profiles on one machine would want the same port.
        "--secure-port=0".into(),
    ];
    build.start(Daemon {
        netns: at.netns.clone(),
        ..Daemon::new("apiserver", &bin("kube-apiserver"), apiserver)
    })?;
    build.ready("API server", || answer(cluster.kubectl(&["get", "--raw", "/readyz"])))?;
    build.start(Daemon {
        netns: at.netns.clone(),
        ..Daemon::new("controller-manager", &bin("kube-controller-manager"), controllers)
    })?;
    Ok(cluster)
}

/// Waits for the controllers' last act at the start; without it no pod can be made.
pub(crate) fn controllers_ready(build: &Build, cluster: &Cluster) -> Result<()> {
    build.ready("controllers", || answer(cluster.kubectl(&["get", "serviceaccount", "default"])))
}

/// A kubectl call as a probe.
pub(crate) fn answer(result: Result<String>) -> Result<(), String> {
    result.map(drop).map_err(|error| error.to_string())
}
