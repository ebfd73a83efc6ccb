//! The whole node: a closed network namespace, and in it the control plane, containerd, kubelet, kube-proxy and scheduler; then DNS and Prometheus as pods.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use crate::cluster::Cluster;
use crate::control_plane::{self, Addresses, answer};
use crate::images::Image;
use crate::lifecycle::{Build, listener};
use crate::paths::{Profile, bin};
use crate::process::{Daemon, enter, run};
use crate::progress::step;
use crate::{addons, host, images};

/// The node's name.
pub(crate) const NAME: &str = "node";
/// The node's address, within the namespace.
pub(crate) const ADDRESS: &str = "172.30.0.1";
/// The API server's Service.
pub(crate) const API_SERVICE: &str = "10.96.0.1";
/// The name server's Service.
pub(crate) const DNS_SERVICE: &str = "10.96.0.10";
/// The pods' addresses.
const PODS: &str = "10.244.0.0/16";

/// The network namespace, a file that `nsenter --net=` takes.
fn netns() -> PathBuf {
    Profile::Node.run().join("netns")
}

/// containerd's socket.
pub(crate) fn socket() -> PathBuf {
    Profile::Node.run().join("containerd.sock")
}

/// containerd's working directory: mounts, and one directory for each container.
fn runtime_state() -> PathBuf {
    Profile::Node.run().join("containerd")
}

/// Brings everything up on a machine that has all programs.
pub(crate) fn start(build: &mut Build) -> Result<Cluster> {
    let data = Profile::Node.data();
    step("make the network namespace", make_network)?;
    host::create_cgroups()?;

    let (port, stdin) = listener()?;
    build.pki.kubeconfig("admin", &format!("https://127.0.0.1:{port}"), &Profile::Node.kubeconfig())?;
    let relay = vec!["relay".to_owned(), "127.0.0.1:6443".to_owned()];
    // By way of /proc, since `cargo test` may have replaced the file from which this process was started.
    let this = PathBuf::from(format!("/proc/{}/exe", std::process::id()));
    let relay = Daemon::new("relay", &this, relay);
    build.start(Daemon { netns: Some(netns()), stdin: Some(stdin), ..relay })?;

    let config = data.join("containerd.toml");
    fs::write(&config, containerd_config()?)?;
    daemon(build, "containerd", &program("containerd")?, vec![format!("--config={}", config.display())])?;

    let addresses = Addresses {
        netns: Some(netns()),
        bind: "0.0.0.0",
        advertise: ADDRESS,
        api_port: 6443,
        etcd_port: 2379,
        etcd_peer_port: 2380,
    };
    let cluster = control_plane::start(build, &addresses)?;

    build.ready("containerd", || answer(images::ctr(&["version"])))?;
    step("import images", || {
        images::import(&Image::new("pause", vec![(bin("pause"), "/pause".into())]))?;
        images::import(&Image::new("coredns", vec![(bin("coredns"), "/usr/local/bin/coredns".into())]))?;
        images::import(&Image::new(
            "prometheus",
            vec![(bin("prometheus"), "/usr/local/bin/prometheus".into())],
        ))
    })?;

    let kubeconfig = |name: &str| -> Result<String> {
        let file = data.join(format!("{name}.kubeconfig"));
        build.pki.kubeconfig(name, "https://127.0.0.1:6443", &file)?;
        Ok(file.display().to_string())
    };
    let [scheduler, kubelet, proxy] =
        [kubeconfig("scheduler")?, kubeconfig("kubelet")?, kubeconfig("kube-proxy")?];
    let arguments =
        vec![format!("--kubeconfig={scheduler}"), "--leader-elect=false".into(), "--secure-port=0".into()];
    daemon(build, "scheduler", &bin("kube-scheduler"), arguments)?;

    let config = data.join("kubelet.json");
    fs::write(
        data.join("resolv.conf"),
        "# Nothing outside of the cluster can be reached, so there is nobody to ask.\n",
    )?;
    fs::write(&config, kubelet_config(build).to_string())?;
    let arguments = vec![
        format!("--config={}", config.display()),
        format!("--kubeconfig={kubelet}"),
        format!("--root-dir={}", data.join("kubelet").display()),
        format!("--hostname-override={NAME}"),
        format!("--node-ip={ADDRESS}"),
    ];
    daemon(build, "kubelet", &bin("kubelet"), arguments)?;

    let config = data.join("kube-proxy.json");
    fs::write(&config, proxy_config(&proxy).to_string())?;
    daemon(build, "kube-proxy", &bin("kube-proxy"), vec![format!("--config={}", config.display())])?;

    build.ready("node", || {
        answer(cluster.kubectl(&["wait", "--for=condition=Ready", "node", NAME, "--timeout=2s"]))
    })?;
    control_plane::controllers_ready(build, &cluster)?;
    addons::install(build, &cluster)?;
    Ok(cluster)
}

/// Ends what the kubelet and containerd started: they leave pods running when they end.
pub(crate) fn end_pods() -> Result<()> {
    host::remove_cgroups()?;
    host::end_shims(&socket(), &runtime_state().join("io.containerd.runtime.v2.task/k8s.io"))
}

fn daemon(build: &mut Build, name: &str, program: &Path, args: Vec<String>) -> Result<()> {
    build.start(Daemon { netns: Some(netns()), ..Daemon::new(name, program, args) })
}

fn program(name: &str) -> Result<PathBuf> {
    host::find(name).with_context(|| format!("{name} is not in PATH although its package is installed"))
}

/// A network with no way in or out. The node's address stands on one end of a veth pair whose other end is inside too (not every kernel has
/// dummy devices), and the default route leads nowhere: kubelet and kube-proxy only want to see one.
fn make_network() -> Result<()> {
    let netns = netns();
    File::create(&netns)?;
    run(Command::new("unshare").arg(format!("--net={}", netns.display())).arg("true"))?;
    for line in [
        "link set lo up",
        "link add node0 type veth peer name node1",
        &format!("addr add {ADDRESS}/24 dev node0"),
        "link set node0 up",
        "link set node1 up",
        "route add default via 172.30.0.2 dev node0",
    ] {
        run(enter(&netns, "ip").args(line.split(' ')))?;
    }
    // Without it, answers of a Service's pod to a pod on the same bridge would bypass the translation of addresses.
    if !Path::new("/proc/sys/net/bridge").exists() {
        run(Command::new("modprobe").arg("br_netfilter"))?;
    }
    for setting in [
        "net/ipv4/ip_forward=1",
        "net/bridge/bridge-nf-call-iptables=1",
        "net/ipv4/conf/all/rp_filter=0",
        "net/ipv4/conf/default/rp_filter=0",
    ] {
        // Which network's setting is written depends on who opens the file.
        let script = "echo \"${1#*=}\" > \"/proc/sys/${1%%=*}\"";
        run(enter(&netns, "sh").args(["-ec", script, "sh", setting]))?;
    }
    Ok(())
}

fn containerd_config() -> Result<String> {
    let run = Profile::Node.run();
    let data = Profile::Node.data();
    let network = data.join("cni");
    fs::create_dir_all(&network)?;
    let list = json!({
        "cniVersion": "0.4.0", "name": "synthex-cluster",
        "plugins": [{
            "type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "hairpinMode": true, "ipMasq": false,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": PODS}]], "dataDir": run.join("ipam")},
        }],
    });
    fs::write(network.join("10-synthex.conflist"), list.to_string())?;
    let plugins =
        host::cni_plugins().context("there are no CNI plugins although their package is installed")?;
    Ok(format!(
        r#"version = 2
root = "{root}"
state = "{state}"
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{opt}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  # Root in a container may lack the right to lower a score, and then no pod would start.
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{plugins}"
  conf_dir = "{network}"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  BinaryName = "{runc}"
  Root = "{runc_root}"
  SystemdCgroup = false
"#,
        root = data.join("containerd").display(),
        state = runtime_state().display(),
        socket = socket().display(),
        opt = data.join("opt").display(),
        pause = images::reference("pause"),
        network = network.display(),
        runc = program("runc")?.display(),
        runc_root = run.join("runc").display(),
    ))
}

fn kubelet_config(build: &Build) -> serde_json::Value {
    let data = Profile::Node.data();
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false}, "webhook": {"enabled": true},
            "x509": {"clientCAFile": build.pki.path("ca.crt")}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": build.pki.path("kubelet.crt"), "tlsPrivateKeyFile": build.pki.path("kubelet.key"),
        "containerRuntimeEndpoint": format!("unix://{}", socket().display()),
        "clusterDNS": [DNS_SERVICE], "clusterDomain": "cluster.local",
        "resolvConf": data.join("resolv.conf"),
        "cgroupDriver": "cgroupfs", "cgroupRoot": format!("/{}", host::CGROUP),
        "failCgroupV1": false, "failSwapOn": false, "oomScoreAdj": 0,
        // No registry could give a removed image back.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        // kube-proxy's nftables are all that is needed.
        "makeIPTablesUtilChains": false,
        "podLogsDir": data.join("pods"), "volumePluginDir": data.join("volume-plugins"),
    })
}

fn proxy_config(kubeconfig: &str) -> serde_json::Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": kubeconfig}, "mode": "nftables", "clusterCIDR": PODS,
        "hostnameOverride": NAME, "oomScoreAdj": 0, "conntrack": {"maxPerCore": 0, "min": 0},
    })
}
