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

/// The SPIFFE Workload API, which lives in no package.
pub mod workload_api {
    include!(concat!(env!("OUT_DIR"), "/_.rs"));
}
