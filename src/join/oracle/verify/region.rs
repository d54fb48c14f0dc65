//! The regions of Oracle's cloud, from its public SDKs: a short name, which is in the IDs of instances, a
//! long one, and the realm, which has a domain of its own.

/// A region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::join::oracle) struct Region {
    /// Its long name, for example `us-phoenix-1`.
    pub(in crate::join::oracle) name: &'static str,
    /// Its realm, for example `oc1`.
    pub(in crate::join::oracle) realm: &'static str,
    domain: &'static str,
}

impl Region {
    /// The region of a short or long name. No other name ever becomes part of a host's.
    pub(in crate::join::oracle) fn of(name: &str) -> Option<Self> {
        let (_, name, realm) = REGIONS.iter().find(|(short, long, _)| {
            name.eq_ignore_ascii_case(short) || name.eq_ignore_ascii_case(long)
        })?;
        let (_, domain) = REALMS.iter().find(|(known, _)| known == realm)?;
        Some(Self {
            name,
            realm,
            domain,
        })
    }

    /// The region in the ID of an instance: `ocid1.instance.REALM.REGION[.…].ID`.
    pub(super) fn of_instance(id: &str) -> Option<Self> {
        let parts: Vec<&str> = id.split('.').collect();
        let ["ocid1", "instance", realm, region, .., _] = parts.as_slice() else {
            return None;
        };
        let well = matches!(parts.len(), 5 | 6);
        Self::of(region).filter(|region| well && region.realm == *realm)
    }

    /// The host that knows whom the region's instances are certified by.
    pub(in crate::join::oracle) fn authority(&self) -> String {
        format!("auth.{}.{}", self.name, self.domain)
    }
}

const REALMS: &[(&str, &str)] = &[
    ("oc1", "oraclecloud.com"),
    ("oc2", "oraclegovcloud.com"),
    ("oc3", "oraclegovcloud.com"),
    ("oc4", "oraclegovcloud.uk"),
    ("oc8", "oraclecloud8.com"),
    ("oc9", "oraclecloud9.com"),
    ("oc10", "oraclecloud10.com"),
    ("oc14", "oraclecloud14.com"),
    ("oc15", "oraclecloud15.com"),
    ("oc19", "oraclecloud.eu"),
    ("oc20", "oraclecloud20.com"),
    ("oc21", "oraclecloud21.com"),
    ("oc24", "oraclecloud24.com"),
    ("oc26", "oraclecloud26.com"),
];

const REGIONS: &[(&str, &str, &str)] = &[
    ("yny", "ap-chuncheon-1", "oc1"),
    ("hyd", "ap-hyderabad-1", "oc1"),
    ("mel", "ap-melbourne-1", "oc1"),
    ("bom", "ap-mumbai-1", "oc1"),
    ("kix", "ap-osaka-1", "oc1"),
    ("icn", "ap-seoul-1", "oc1"),
    ("syd", "ap-sydney-1", "oc1"),
    ("nrt", "ap-tokyo-1", "oc1"),
    ("yul", "ca-montreal-1", "oc1"),
    ("yyz", "ca-toronto-1", "oc1"),
    ("ams", "eu-amsterdam-1", "oc1"),
    ("fra", "eu-frankfurt-1", "oc1"),
    ("zrh", "eu-zurich-1", "oc1"),
    ("jed", "me-jeddah-1", "oc1"),
    ("dxb", "me-dubai-1", "oc1"),
    ("gru", "sa-saopaulo-1", "oc1"),
    ("cwl", "uk-cardiff-1", "oc1"),
    ("lhr", "uk-london-1", "oc1"),
    ("iad", "us-ashburn-1", "oc1"),
    ("phx", "us-phoenix-1", "oc1"),
    ("sjc", "us-sanjose-1", "oc1"),
    ("vcp", "sa-vinhedo-1", "oc1"),
    ("scl", "sa-santiago-1", "oc1"),
    ("mtz", "il-jerusalem-1", "oc1"),
    ("mrs", "eu-marseille-1", "oc1"),
    ("sin", "ap-singapore-1", "oc1"),
    ("auh", "me-abudhabi-1", "oc1"),
    ("lin", "eu-milan-1", "oc1"),
    ("arn", "eu-stockholm-1", "oc1"),
    ("jnb", "af-johannesburg-1", "oc1"),
    ("cdg", "eu-paris-1", "oc1"),
    ("qro", "mx-queretaro-1", "oc1"),
    ("mad", "eu-madrid-1", "oc1"),
    ("ord", "us-chicago-1", "oc1"),
    ("mty", "mx-monterrey-1", "oc1"),
    ("aga", "us-saltlake-2", "oc1"),
    ("bog", "sa-bogota-1", "oc1"),
    ("vap", "sa-valparaiso-1", "oc1"),
    ("lfi", "us-langley-1", "oc2"),
    ("luf", "us-luke-1", "oc2"),
    ("ric", "us-gov-ashburn-1", "oc3"),
    ("pia", "us-gov-chicago-1", "oc3"),
    ("tus", "us-gov-phoenix-1", "oc3"),
    ("ltn", "uk-gov-london-1", "oc4"),
    ("brs", "uk-gov-cardiff-1", "oc4"),
    ("nja", "ap-chiyoda-1", "oc8"),
    ("ukb", "ap-ibaraki-1", "oc8"),
    ("mct", "me-dcc-muscat-1", "oc9"),
    ("wga", "ap-dcc-canberra-1", "oc10"),
    ("bgy", "eu-dcc-milan-1", "oc14"),
    ("mxp", "eu-dcc-milan-2", "oc14"),
    ("snn", "eu-dcc-dublin-2", "oc14"),
    ("dtm", "eu-dcc-rating-2", "oc14"),
    ("dus", "eu-dcc-rating-1", "oc14"),
    ("ork", "eu-dcc-dublin-1", "oc14"),
    ("dac", "ap-dcc-gazipur-1", "oc15"),
    ("vll", "eu-madrid-2", "oc19"),
    ("str", "eu-frankfurt-2", "oc19"),
    ("beg", "eu-jovanovac-1", "oc20"),
    ("doh", "me-dcc-doha-1", "oc21"),
    ("avz", "eu-dcc-zurich-1", "oc24"),
    ("ahu", "me-abudhabi-3", "oc26"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_region_has_a_host() {
        for (short, long, realm) in REGIONS {
            let region = Region::of(short).unwrap();
            assert_eq!(Some(region), Region::of(long));
            assert_eq!((region.name, region.realm), (*long, *realm));
        }
        assert_eq!(
            Region::of("PHX").unwrap().authority(),
            "auth.us-phoenix-1.oraclecloud.com"
        );
        assert_eq!(
            Region::of("eu-madrid-2").unwrap().authority(),
            "auth.eu-madrid-2.oraclecloud.eu"
        );
    }

    #[test]
    fn instances_name_their_region() {
        for good in [
            "ocid1.instance.oc1.phx.abc",
            "ocid1.instance.oc1.us-phoenix-1.future.abc",
        ] {
            assert_eq!(
                Region::of_instance(good).unwrap().name,
                "us-phoenix-1",
                "{good}"
            );
        }
        for bad in [
            "",
            "ocid1.instance.oc1.phx",
            "ocid1.instance.oc2.phx.abc",
            "ocid1.instance.oc1..abc",
            "ocid1.instance.oc1.evil-1.abc",
            "ocid1.instance.oc1.phx.a.b.c",
            "ocid1.tenancy.oc1.phx.abc",
            "ocid2.instance.oc1.phx.abc",
        ] {
            assert_eq!(Region::of_instance(bad), None, "{bad}");
        }
    }
}
