//! Whose an instance is: its certificate says so in organizational units.

use serde_json::Value;

use super::Region;
use crate::crypto::x509::{Certificate, ORGANIZATIONAL_UNIT};
use crate::join::verify::admitted;

/// What a certificate says of its instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::join::oracle) struct Claims {
    /// Its tenancy's OCID.
    pub(in crate::join::oracle) tenancy: String,
    /// Its compartment's OCID.
    pub(super) compartment: String,
    /// Its own OCID.
    pub(super) instance: String,
}

impl Claims {
    /// Reads them; each has to be there once.
    pub(in crate::join::oracle) fn of(certificate: &Certificate) -> Result<Self, &'static str> {
        Self::read(&certificate.subject(ORGANIZATIONAL_UNIT))
    }

    fn read(units: &[String]) -> Result<Self, &'static str> {
        let unit = |name: &str| {
            let mut found = units
                .iter()
                .filter_map(|unit| unit.split_once(':').filter(|(key, _)| *key == name))
                .map(|(_, value)| value.to_owned());
            (found.next(), found.next())
        };
        let only = |name, missing| match unit(name) {
            (Some(value), None) if !value.is_empty() => Ok(value),
            _ => Err(missing),
        };
        match unit("opc-certtype") {
            (None, None) => {}
            (Some(kind), None) if kind == "instance" => {}
            _ => return Err("opc-certtype is not instance"),
        }
        Ok(Self {
            tenancy: only("opc-tenant", "no TenancyID found")?,
            compartment: only("opc-compartment", "no CompartmentID found")?,
            instance: only("opc-instance", "no InstanceID found")?,
        })
    }

    /// Whether a rule lets the instance in; otherwise what each differs in.
    pub(super) fn admitted(&self, allow: Option<&Value>) -> Result<(), String> {
        admitted(allow, |rule| self.differs(rule))
    }

    fn differs(&self, rule: &Value) -> Vec<&'static str> {
        let region = Region::of_instance(&self.instance);
        let any = |key: &str, is: &dyn Fn(&str) -> bool| match rule.get(key) {
            None => true,
            Some(list) => list
                .as_array()
                .is_some_and(|list| list.iter().filter_map(Value::as_str).any(is)),
        };
        let tenancy = rule.get("tenancy").and_then(Value::as_str);
        [
            ("tenancy", tenancy == Some(&self.tenancy)),
            (
                "parent_compartments",
                any("parent_compartments", &|it| it == self.compartment),
            ),
            (
                "regions",
                any("regions", &|it| {
                    region.is_some() && Region::of(it) == region
                }),
            ),
            ("instances", any("instances", &|it| it == self.instance)),
        ]
        .into_iter()
        .filter(|(_, met)| !met)
        .map(|(key, _)| key)
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn units(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn mine() -> Claims {
        Claims::read(&units(&[
            "opc-certtype:instance",
            "opc-tenant:ocid1.tenancy.oc1..t",
            "opc-compartment:ocid1.compartment.oc1..c",
            "opc-instance:ocid1.instance.oc1.phx.i",
            "something else",
        ]))
        .unwrap()
    }

    #[test]
    fn certificates_say_whose_an_instance_is_and_each_once() {
        assert_eq!(mine().instance, "ocid1.instance.oc1.phx.i");
        let all = ["opc-tenant:t", "opc-compartment:c", "opc-instance:i"];
        assert!(Claims::read(&units(&all)).is_ok());
        for missing in 0..all.len() {
            let mut some = all.to_vec();
            let gone = some.remove(missing);
            assert!(Claims::read(&units(&some)).is_err(), "{gone}");
            let mut twice = all.to_vec();
            twice.push(all[missing]);
            assert!(Claims::read(&units(&twice)).is_err(), "{gone} twice");
            some.push(gone.split_inclusive(':').next().unwrap());
            assert!(Claims::read(&units(&some)).is_err(), "{gone} empty");
        }
        for other in [
            &["opc-certtype:user"][..],
            &["opc-certtype:"],
            &["opc-certtype:", "opc-certtype:instance"],
        ] {
            let other = [&all[..], other].concat();
            assert_eq!(
                Claims::read(&units(&other)),
                Err("opc-certtype is not instance")
            );
        }
    }

    #[test]
    fn every_key_of_a_rule_has_to_match() {
        let near = |rule: Value| mine().admitted(Some(&json!([rule]))).err();
        let tenancy = "ocid1.tenancy.oc1..t";
        let (here, there) = ("ocid1.compartment.oc1..c", "ocid1.compartment.oc1..d");
        assert_eq!(near(json!({"tenancy": tenancy})), None);
        assert_eq!(
            near(json!({
                "tenancy": tenancy, "parent_compartments": [there, here],
                "regions": ["fra", "us-phoenix-1"], "instances": ["ocid1.instance.oc1.phx.i"],
            })),
            None
        );
        for (rule, differs) in [
            (json!({"tenancy": "ocid1.tenancy.oc1..u"}), "tenancy"),
            (
                json!({"tenancy": tenancy, "parent_compartments": [there]}),
                "parent_compartments",
            ),
            (json!({"tenancy": tenancy, "regions": ["iad"]}), "regions"),
            (
                json!({"tenancy": tenancy, "instances": ["ocid1.instance.oc1.phx.j"]}),
                "instances",
            ),
            (json!({"parent_compartments": [here]}), "tenancy"),
            (json!({}), "tenancy"),
            (json!(7), "tenancy"),
            (json!({"tenancy": tenancy, "regions": "phx"}), "regions"),
        ] {
            assert_eq!(
                near(rule.clone()),
                Some(format!("rule 1 differs in {differs}")),
                "{rule}"
            );
        }
        assert!(mine().admitted(None).is_err());
    }
}
