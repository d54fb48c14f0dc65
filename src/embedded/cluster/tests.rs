mod lab;
mod patience;
mod refusals;
mod rotation;

use super::*;

#[test]
fn public_addresses_get_a_port_and_become_names_of_the_certificate() {
    let bound: SocketAddr = "127.0.0.1:3080".parse().unwrap();
    let given = [
        "a.example:443",
        "b.example",
        "::1",
        "[::1]:1",
        "https://c.example/",
        "10.0.0.1",
    ];
    let addrs = public_addrs(&given.map(str::to_owned), bound);
    assert_eq!(
        addrs,
        [
            "a.example:443",
            "b.example:3080",
            "[::1]:3080",
            "[::1]:1",
            "c.example:3080",
            "10.0.0.1:3080"
        ]
    );
    assert_eq!(
        hosts(&addrs),
        [
            "a.example",
            "b.example",
            "::1",
            "c.example",
            "10.0.0.1",
            "localhost",
            "127.0.0.1"
        ]
    );
    assert_eq!(public_addrs(&[], bound), ["127.0.0.1:3080"]);
    let all: SocketAddr = "0.0.0.0:3080".parse().unwrap();
    assert!(!public_addrs(&[], all)[0].contains("0.0.0.0"));
}

mod over_the_wire {
    use std::net::SocketAddr;
    use std::time::Duration;

    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
    use rustls::{ClientConfig, RootCertStore};
    use tempfile::TempDir;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::task::JoinHandle;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client::TlsStream;

    use super::*;
    use crate::crypto::x509::Certificate;
    use crate::crypto::{KeyAlgorithm, PrivateKey};
    use crate::embedded::ca::AuthorityType;
    use crate::pb::proto::PingRequest;
    use crate::pb::proto::auth_service_client::AuthServiceClient;

    const NAME: &str = "root";
    const AUTH: &str = "teleport-auth@726f6f74.teleport.cluster.local";

    struct Running {
        dir: TempDir,
        state: Arc<ClusterState>,
        addr: SocketAddr,
        auth: SocketAddr,
        shutdown: CancellationToken,
        serving: JoinHandle<Result<(), ClusterError>>,
    }

    impl Running {
        async fn start() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let mut config = Config::local(dir.path().join("c"), Clock::system());
            config.cluster_name = Some(NAME.to_owned());
            config.auth_listen = Some(config.listen);
            let cluster = Cluster::open(config).await.unwrap();
            let state = Arc::clone(cluster.state());
            let (addr, auth) = (cluster.web_addr(), cluster.auth_addr().unwrap());
            let shutdown = CancellationToken::new();
            let serving = tokio::spawn(cluster.serve(shutdown.clone()));
            Self {
                dir,
                state,
                addr,
                auth,
                shutdown,
                serving,
            }
        }

        fn web_roots(&self) -> Vec<CertificateDer<'static>> {
            let path = self.dir.path().join("c/web-ca.pem");
            CertificateDer::pem_file_iter(path)
                .unwrap()
                .map(Result::unwrap)
                .collect()
        }

        fn host_roots(&self) -> Vec<CertificateDer<'static>> {
            let host = self.state.authorities.trusted_tls(AuthorityType::Host);
            host.into_iter().map(CertificateDer::from).collect()
        }

        async fn stop(self) {
            self.shutdown.cancel();
            self.serving.await.unwrap().unwrap();
        }
    }

    async fn connect(
        addr: SocketAddr,
        name: &str,
        protocols: &[&str],
        roots: Vec<CertificateDer<'static>>,
        identity: Option<(Vec<u8>, &PrivateKey)>,
    ) -> io::Result<TlsStream<TcpStream>> {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(roots);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(store);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let key = PrivatePkcs8KeyDer::from(key.pkcs8_der().expose().clone());
                let chain = vec![CertificateDer::from(certificate)];
                builder.with_client_auth_cert(chain, key.into()).unwrap()
            }
        };
        config.alpn_protocols = protocols
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        let stream = TcpStream::connect(addr).await?;
        let name = ServerName::try_from(name.to_owned()).unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
    }

    fn negotiated(stream: &TlsStream<TcpStream>) -> Option<&[u8]> {
        stream.get_ref().1.alpn_protocol()
    }

    async fn http(stream: &mut TlsStream<TcpStream>, request: &str) -> (String, serde_json::Value) {
        let request = format!("{request}\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = Vec::new();
        // The server may leave without closing the TLS session.
        drop(stream.read_to_end(&mut text).await);
        let text = String::from_utf8(text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (
            head.to_owned(),
            serde_json::from_str(body).unwrap_or_default(),
        )
    }

    async fn get(cluster: &Running, path: &str) -> (String, serde_json::Value) {
        let mut stream = connect(cluster.addr, "localhost", &[], cluster.web_roots(), None)
            .await
            .unwrap();
        http(&mut stream, &format!("GET {path} HTTP/1.1")).await
    }

    #[tokio::test]
    async fn a_directory_that_others_use_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("report.txt"), "x").unwrap();
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        let config = Config::local(dir.path().to_owned(), Clock::system());
        let error = Cluster::open(config).await.unwrap_err().to_string();
        assert!(
            error.contains("a directory of the cluster's own"),
            "{error}"
        );
        let mode = std::fs::metadata(dir.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn protocols_lead_to_their_certificates() {
        let cluster = Running::start().await;
        let (web, host) = (cluster.web_roots(), cluster.host_roots());
        let cases = [
            ("localhost", vec!["h2", "http/1.1"], &web, &b"h2"[..]),
            ("127.0.0.1", vec!["http/1.1"], &web, b"http/1.1"),
            ("localhost", vec!["teleport-proxy-grpc", "h2"], &web, b"h2"),
            (
                "localhost",
                vec!["teleport-reversetunnel"],
                &web,
                b"teleport-reversetunnel",
            ),
            (
                "726f6f74.teleport.cluster.local",
                vec![AUTH, "h2"],
                &host,
                b"h2",
            ),
            ("teleport.cluster.local", vec![AUTH, "h2"], &host, b"h2"),
        ];
        for (name, protocols, roots, expected) in cases {
            let stream = connect(cluster.addr, name, &protocols, roots.clone(), None).await;
            let stream = stream.unwrap_or_else(|error| panic!("{name} {protocols:?}: {error}"));
            assert_eq!(negotiated(&stream), Some(expected), "{name} {protocols:?}");
        }
        let direct = connect(
            cluster.auth,
            "teleport.cluster.local",
            &["h2"],
            host.clone(),
            None,
        );
        assert_eq!(negotiated(&direct.await.unwrap()), Some(&b"h2"[..]));
        let other = "teleport-auth@6f74686572.teleport.cluster.local";
        for protocols in [&[other, "h2"][..], &["teleport-proxy-ssh"]] {
            let refused = connect(cluster.addr, "localhost", protocols, web.clone(), None).await;
            assert!(refused.is_err(), "{protocols:?}");
        }
        cluster.stop().await;
    }

    #[tokio::test]
    async fn discovery_has_the_members_of_a_real_proxy() {
        let cluster = Running::start().await;
        // Recorded from a Teleport 18.0.0 proxy: the members and their types.
        let find = [
            "auth.device_trust",
            "auth.default_session_ttl",
            "auth.has_motd",
            "auth.piv_pin_cache_ttl",
            "auth.piv_slot",
            "auth.private_key_policy",
            "auth.signature_algorithm_suite",
            "auth.type",
            "auto_update.agent_auto_update",
            "auto_update.agent_update_jitter_seconds",
            "auto_update.agent_version",
            "auto_update.tools_auto_update",
            "auto_update.tools_version",
            "automatic_upgrades",
            "cluster_name",
            "edition",
            "fips",
            "min_client_version",
            "proxy.db.mysql_listen_addr",
            "proxy.db.postgres_listen_addr",
            "proxy.kube.enabled",
            "proxy.kube.listen_addr",
            "proxy.ssh.dial_timeout",
            "proxy.ssh.listen_addr",
            "proxy.ssh.public_addr",
            "proxy.ssh.tunnel_listen_addr",
            "proxy.ssh.web_listen_addr",
            "proxy.tls_routing_enabled",
            "server_version",
        ];
        for path in [
            "/webapi/find",
            "/v1/webapi/find",
            "/webapi/ping",
            "/webapi/ping/local",
        ] {
            let (head, body) = get(&cluster, path).await;
            assert!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
            assert!(head.contains("\r\ndate: "), "{head}");
            for member in find {
                let pointer = format!("/{}", member.replace('.', "/"));
                assert!(body.pointer(&pointer).is_some(), "{path} lacks {member}");
            }
            assert_eq!(body["cluster_name"], NAME);
            assert_eq!(body["auth"]["signature_algorithm_suite"], "balanced-v1");
            assert_eq!(
                body["proxy"]["ssh"]["public_addr"],
                cluster.addr.to_string()
            );
        }
        let (_, ping) = get(&cluster, "/webapi/ping").await;
        assert_eq!(ping["auth"]["type"], "local");
        assert_eq!(ping["auth"]["default_session_ttl"], "12h0m0s");
        cluster.stop().await;
    }

    #[tokio::test]
    async fn relying_parties_find_their_documents() {
        let cluster = Running::start().await;
        let members = [
            ("/webapi/spiffe/bundle.json", "/keys/1/kid"),
            ("/workload-identity/jwt-jwks.json", "/keys/0/kid"),
            (
                "/workload-identity/.well-known/openid-configuration",
                "/jwks_uri",
            ),
        ];
        for (path, member) in members {
            let (head, body) = get(&cluster, path).await;
            assert!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
            assert!(body.pointer(member).is_some(), "{path}: {body}");
            let kept = "cache-control: public, max-age=300";
            assert!(head.to_lowercase().contains(kept), "{path}: {head}");
        }
        let (head, _) = get(&cluster, "/webapi/find").await;
        assert!(!head.to_lowercase().contains("cache-control"), "{head}");
        cluster.stop().await;
    }

    #[tokio::test]
    async fn odd_requests_are_refused_in_the_proxys_words() {
        let cluster = Running::start().await;
        let cases = [
            ("GET /nothing HTTP/1.1", "404"),
            ("DELETE /webapi/find HTTP/1.1", "405"),
            ("GET /webapi/host/credentials HTTP/1.1", "405"),
        ];
        for (request, status) in cases {
            let mut stream = connect(cluster.addr, "localhost", &[], cluster.web_roots(), None)
                .await
                .unwrap();
            let (head, body) = http(&mut stream, request).await;
            assert!(
                head.starts_with(&format!("HTTP/1.1 {status}")),
                "{request}: {head}"
            );
            assert!(body["error"]["message"].is_string(), "{request}: {body}");
        }
        // What is no TLS at all is dropped without harm.
        let mut plain = TcpStream::connect(cluster.addr).await.unwrap();
        plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut rest = Vec::new();
        drop(plain.read_to_end(&mut rest).await);
        let (head, _) = get(&cluster, "/webapi/find").await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        cluster.stop().await;
    }

    #[tokio::test]
    async fn a_certificate_of_somebody_else_does_not_get_in() {
        let cluster = Running::start().await;
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let now = Clock::system().now();
        let foreign = Store::in_memory(Clock::system()).unwrap();
        let foreign = Authorities::open(&foreign, NAME, Suite::BalancedV1, now).unwrap();
        let certificate = foreign.host_identity(&[], now).unwrap();
        let identity = Some((certificate.certificate, &certificate.key));
        let host = cluster.host_roots();
        let connected = connect(
            cluster.auth,
            "teleport.cluster.local",
            &["h2"],
            host,
            identity,
        )
        .await;
        // With TLS 1.3 the refusal comes after the client's side of the handshake.
        if let Ok(mut stream) = connected {
            let mut rest = Vec::new();
            let read = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest));
            assert!(read.await.unwrap().is_err());
        }
        drop(key);
        cluster.stop().await;
    }

    #[tokio::test]
    async fn the_data_directory_is_private_and_has_one_server() {
        let cluster = Running::start().await;
        let dir = cluster.dir.path().join("c");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        for name in [
            "admin.sock",
            "audit.jsonl",
            "cluster.db",
            "cluster.db-wal",
            "lock",
        ] {
            assert_eq!(mode(&dir.join(name)), 0o600, "{name}");
        }
        let error = Cluster::open(Config::local(dir.clone(), Clock::system()))
            .await
            .unwrap_err();
        assert!(matches!(error, ClusterError::Running(_)), "{error}");
        let pin = cluster.state.authorities.host_pin();
        let web = cluster.web_roots();
        cluster.shutdown.cancel();
        cluster.serving.await.unwrap().unwrap();
        assert!(!dir.join("admin.sock").exists());
        let mut config = Config::local(dir.clone(), Clock::system());
        let again = Cluster::open(config.clone()).await.unwrap();
        assert_eq!(again.ca_pin(), pin);
        assert_eq!(again.state().name, NAME);
        let exported = CertificateDer::pem_file_iter(again.web_ca().unwrap()).unwrap();
        assert_eq!(exported.map(Result::unwrap).collect::<Vec<_>>(), web);
        drop(again);
        config.cluster_name = Some("other".to_owned());
        let error = Cluster::open(config).await.unwrap_err();
        assert!(
            error
                .to_string()
                .contains("is named \"root\", not \"other\""),
            "{error}"
        );
    }

    #[tokio::test]
    async fn resource_files_are_applied_at_every_start() {
        let dir = tempfile::tempdir().unwrap();
        let files = dir.path().join("resources");
        fs::create_dir(&files).unwrap();
        let bot = "kind: bot\nversion: v1\nmetadata: {name: example}\nspec: {roles: []}\n";
        fs::write(files.join("bot.yaml"), bot).unwrap();
        fs::write(files.join("notes.txt"), "kind: nothing").unwrap();
        let mut config = Config::local(dir.path().join("c"), Clock::system());
        config.cluster_name = Some("bad name".to_owned());
        let error = Cluster::open(config.clone()).await.unwrap_err();
        assert!(matches!(error, ClusterError::Name(_)), "{error}");
        config.cluster_name = Some(NAME.to_owned());
        config.resources = vec![files.clone()];
        let revision = |cluster: &Cluster| {
            let bot = cluster.state().store.get("bot", "example").unwrap();
            bot.unwrap().revision
        };
        let first = revision(&Cluster::open(config.clone()).await.unwrap());
        assert_eq!(
            revision(&Cluster::open(config.clone()).await.unwrap()),
            first
        );
        fs::write(files.join("bad.yaml"), "kind: bt").unwrap();
        let error = Cluster::open(config).await.unwrap_err();
        assert!(
            error.to_string().contains("bad.yaml:1:7: error:"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn the_web_certificate_may_be_given() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let store = Store::in_memory(Clock::system()).unwrap();
        let made = WebCertificate::make(
            &store,
            "x",
            &["given.example".to_owned()],
            None,
            Clock::system().now(),
        )
        .unwrap();
        fs::write(
            &cert,
            crate::crypto::pem::encode("CERTIFICATE", &made.chain[0]),
        )
        .unwrap();
        fs::write(&key, made.key.to_pem().expose()).unwrap();
        let mut config = Config::local(dir.path().join("c"), Clock::system());
        config.cluster_name = Some(NAME.to_owned());
        config.tls = Some((cert.clone(), key.clone()));
        let cluster = Cluster::open(config.clone()).await.unwrap();
        assert!(cluster.web_ca().is_none());
        let addr = cluster.web_addr();
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(cluster.serve(shutdown.clone()));
        let roots = vec![CertificateDer::from(made.chain[1].clone())];
        let stream = connect(addr, "given.example", &["h2"], roots, None)
            .await
            .unwrap();
        let shown = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
        assert_eq!(
            Certificate::from_der(&shown).unwrap().dns_sans(),
            ["given.example"]
        );
        shutdown.cancel();
        serving.await.unwrap().unwrap();
        let other = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        fs::write(&key, other.to_pem().expose()).unwrap();
        let error = Cluster::open(config).await.unwrap_err();
        assert!(
            matches!(error, ClusterError::Tls(TlsError::Refused { .. })),
            "{error}"
        );
    }

    #[tokio::test]
    async fn unknown_services_are_unimplemented_on_the_join_side() {
        let cluster = Running::start().await;
        let roots = cluster.web_roots();
        let stream = connect(
            cluster.addr,
            "localhost",
            &["teleport-proxy-grpc", "h2"],
            roots,
            None,
        );
        let stream = stream.await.unwrap();
        let mut stream = Some(hyper_util::rt::TokioIo::new(stream));
        let channel = tonic::transport::Endpoint::from_static("https://cluster")
            .connect_with_connector(tower::service_fn(move |_uri: http::Uri| {
                let stream = stream.take();
                async move { stream.ok_or_else(|| io::Error::other("one connection only")) }
            }))
            .await
            .unwrap();
        let status = AuthServiceClient::new(channel)
            .ping(PingRequest {})
            .await
            .unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unimplemented);
        cluster.stop().await;
    }
}
