//! Generated protobuf messages, clients and servers, and nothing else.
//!
//! The sources are in `proto/`; `proto/README.md` tells where each fact comes from.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]

pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));
}

pub mod types {
    include!(concat!(env!("OUT_DIR"), "/types.rs"));
}

pub mod teleport {
    pub mod clusterconfig {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/teleport.clusterconfig.v1.rs"));
        }
    }
    pub mod header {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/teleport.header.v1.rs"));
        }
    }
    pub mod join {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/teleport.join.v1.rs"));
        }
    }
    pub mod machineid {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/teleport.machineid.v1.rs"));
        }
    }
    pub mod presence {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/teleport.presence.v1.rs"));
        }
    }
    pub mod transport {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/teleport.transport.v1.rs"));
        }
    }
    pub mod trust {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/teleport.trust.v1.rs"));
        }
    }
    pub mod workloadidentity {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/teleport.workloadidentity.v1.rs"));
        }
    }
}

/// Envoy's secret discovery service.
pub mod envoy {
    pub mod config {
        pub mod core {
            pub mod v3 {
                include!(concat!(env!("OUT_DIR"), "/envoy.config.core.v3.rs"));
            }
        }
    }
    pub mod extensions {
        pub mod transport_sockets {
            pub mod tls {
                pub mod v3 {
                    include!(concat!(
                        env!("OUT_DIR"),
                        "/envoy.extensions.transport_sockets.tls.v3.rs"
                    ));
                }
            }
        }
    }
    pub mod service {
        pub mod discovery {
            pub mod v3 {
                include!(concat!(env!("OUT_DIR"), "/envoy.service.discovery.v3.rs"));
            }
        }
        pub mod secret {
            pub mod v3 {
                include!(concat!(env!("OUT_DIR"), "/envoy.service.secret.v3.rs"));
            }
        }
    }
    pub mod r#type {
        pub mod v3 {
            include!(concat!(env!("OUT_DIR"), "/envoy.r#type.v3.rs"));
        }
    }
}

pub mod google {
    pub mod rpc {
        include!(concat!(env!("OUT_DIR"), "/google.rpc.rs"));
    }
}

/// What the agent tells of its callers.
pub mod tbot {
    pub mod inspect {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/tbot.inspect.v1.rs"));
        }
    }
}

/// Descriptors of the services on the Workload API's socket, for clients that ask the server what it has.
pub const SERVED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/served.bin"));

pub mod dev {
    pub mod sigstore {
        pub mod bundle {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/dev.sigstore.bundle.v1.rs"));
            }
        }
        pub mod common {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/dev.sigstore.common.v1.rs"));
            }
        }
        pub mod rekor {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/dev.sigstore.rekor.v1.rs"));
            }
        }
    }
}

pub mod io {
    pub mod intoto {
        include!(concat!(env!("OUT_DIR"), "/io.intoto.rs"));
    }
}

/// The SPIFFE Workload API, which lives in no package.
pub mod workload_api {
    include!(concat!(env!("OUT_DIR"), "/_.rs"));
}
