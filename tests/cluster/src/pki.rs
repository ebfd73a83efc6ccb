//! Certificates, keys and kubeconfigs of one cluster. Writes only to its own directory, by the openssl program.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::process::run;

/// A directory of certificates.
pub(crate) struct Pki {
    dir: PathBuf,
}

impl Pki {
    /// Makes all that a cluster needs. `server` are further subject alternative names of the API server,
    /// such as `IP:10.0.0.1`; `node` is the node's name and address, if there is one.
    pub(crate) fn create(dir: PathBuf, server: &[String], node: Option<(&str, &str)>) -> Result<Pki> {
        fs::create_dir_all(&dir)?;
        // All in there are keys to the cluster.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
        // A configuration of our own: the machine's would mark every certificate as an authority.
        fs::write(dir.join("openssl.cnf"), "[req]\ndistinguished_name=dn\n[dn]\n")?;
        let pki = Pki { dir };
        pki.authority("ca")?;
        pki.authority("front-proxy-ca")?;
        let mut names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
            .map(|name| format!("DNS:{name}"))
            .to_vec();
        names.push("DNS:kubernetes.default.svc.cluster.local".into());
        names.push("IP:127.0.0.1".into());
        names.extend_from_slice(server);
        pki.issue("ca", "apiserver", "/CN=kube-apiserver", &names.join(","))?;
        pki.issue("ca", "apiserver-kubelet", "/O=system:masters/CN=kube-apiserver-kubelet-client", "")?;
        pki.issue("ca", "admin", "/O=system:masters/CN=admin", "")?;
        pki.issue("ca", "controller-manager", "/CN=system:kube-controller-manager", "")?;
        pki.issue("front-proxy-ca", "front-proxy", "/CN=front-proxy", "")?;
        if let Some((name, address)) = node {
            pki.issue("ca", "scheduler", "/CN=system:kube-scheduler", "")?;
            pki.issue("ca", "kube-proxy", "/CN=system:kube-proxy", "")?;
            let subject = format!("/O=system:nodes/CN=system:node:{name}");
            pki.issue("ca", "kubelet", &subject, &format!("DNS:{name},IP:{address}"))?;
        }
        // Signs pods' tokens. The API server reads the public half from the certificate.
        pki.issue("ca", "service-account", "/CN=service-account", "")?;
        Ok(pki)
    }

    /// Path of a file, such as `ca.crt`.
    pub(crate) fn path(&self, file: &str) -> String {
        self.dir.join(file).display().to_string()
    }

    fn request(&self, name: &str, subject: &str) -> Command {
        let mut command = Command::new("openssl");
        command
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "365",
            ])
            .args(["-config", &self.path("openssl.cnf"), "-subj", subject])
            .args([
                "-keyout",
                &self.path(&format!("{name}.key")),
                "-out",
                &self.path(&format!("{name}.crt")),
            ]);
        command
    }

    fn authority(&self, name: &str) -> Result<()> {
        run(self.request(name, &format!("/CN={name}")).args([
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-addext",
            "keyUsage=critical,keyCertSign",
        ]))?;
        Ok(())
    }

    fn issue(&self, authority: &str, name: &str, subject: &str, alternative_names: &str) -> Result<()> {
        let mut command = self.request(name, subject);
        command
            .args([
                "-CA",
                &self.path(&format!("{authority}.crt")),
                "-CAkey",
                &self.path(&format!("{authority}.key")),
            ])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-addext", "keyUsage=critical,digitalSignature"])
            .args(["-addext", "extendedKeyUsage=clientAuth,serverAuth"]);
        if !alternative_names.is_empty() {
            command.args(["-addext", &format!("subjectAltName={alternative_names}")]);
        }
        run(&mut command)?;
        Ok(())
    }

    /// Writes a kubeconfig for the holder of certificate `name`. It holds the keys, so it can be copied.
    pub(crate) fn kubeconfig(&self, name: &str, server: &str, file: &Path) -> Result<()> {
        let data =
            |file: String| -> Result<String> { Ok(BASE64_STANDARD.encode(fs::read(self.path(&file))?)) };
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "synthex",
            "clusters": [{"name": "synthex", "cluster": {
                "server": server, "certificate-authority-data": data("ca.crt".into())?}}],
            "users": [{"name": name, "user": {
                "client-certificate-data": data(format!("{name}.crt"))?, "client-key-data": data(format!("{name}.key"))?}}],
            "contexts": [{"name": "synthex", "context": {"cluster": "synthex", "user": name}}],
        });
        fs::write(file, serde_json::to_vec_pretty(&config)?)?;
        fs::set_permissions(file, fs::Permissions::from_mode(0o600))?;
        Ok(())
    }
}
