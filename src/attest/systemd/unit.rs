//! From systemd's object paths to names of services.

/// Why a unit gives no service name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UnitError {
    /// The process belongs to a scope, a slice or another unit that is no service: it was started
    /// from a session or by a container engine.
    #[error("its unit {0} is not a service")]
    NotAService(String),
    /// systemd answered with something that is no unit's object path.
    #[error("systemd answered with {0:?}, which is no unit")]
    NotAUnit(String),
}

/// The name of the service whose object path this is, without `.service`. An instance of a
/// template keeps its instance: `worker@1`.
pub(super) fn service_of_path(path: &str) -> Result<String, UnitError> {
    let not_a_unit = || UnitError::NotAUnit(path.to_owned());
    let element = path
        .strip_prefix("/org/freedesktop/systemd1/unit/")
        .filter(|element| !element.is_empty() && !element.contains('/'))
        .ok_or_else(not_a_unit)?;
    service_of_unit(&decode(element).ok_or_else(not_a_unit)?)
}

/// The name of the service `unit`, without `.service`.
pub(super) fn service_of_unit(unit: &str) -> Result<String, UnitError> {
    match unit.strip_suffix(".service") {
        Some(name) if !name.is_empty() => Ok(name.to_owned()),
        _ => Err(UnitError::NotAService(unit.to_owned())),
    }
}

/// Undoes the escaping of bus path elements: `_` and two hex digits stand for one byte, and a
/// lone `_` for the empty text.
fn decode(element: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(element.len());
    let mut rest = element.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'_' {
            let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
            let value = digit(rest.next())? * 16 + digit(rest.next())?;
            bytes.push(u8::try_from(value).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_named() {
        for (element, name) in [
            ("my_2dapp_2eservice", "my-app"),
            ("nginx_2eservice", "nginx"),
            ("worker_401_2eservice", "worker@1"),
            ("getty_40tty1_2eservice", "getty@tty1"),
            ("_30x_2eservice", "0x"),
            ("a_5fb_2eservice", "a_b"),
            ("caf_c3_a9_2eservice", "café"),
            ("x_2eservice_2eservice", "x.service"),
        ] {
            let path = format!("/org/freedesktop/systemd1/unit/{element}");
            assert_eq!(service_of_path(&path).as_deref(), Ok(name), "{element}");
        }
    }

    #[test]
    fn other_units_are_told_apart() {
        for (element, unit) in [
            ("session_2d3_2escope", "session-3.scope"),
            ("system_2eslice", "system.slice"),
            ("_2eservice", ".service"),
            ("x_2eservice2", "x.service2"),
        ] {
            let path = format!("/org/freedesktop/systemd1/unit/{element}");
            let error = UnitError::NotAService(unit.to_owned());
            assert_eq!(service_of_path(&path), Err(error), "{element}");
        }
    }

    #[test]
    fn other_paths_are_refused() {
        for path in [
            "",
            "/",
            "/org/freedesktop/systemd1/unit/",
            "/org/freedesktop/systemd1/job/1",
            "/org/freedesktop/systemd1/unit/a/b_2eservice",
            "/org/freedesktop/systemd1/unit/a_",
            "/org/freedesktop/systemd1/unit/a_2",
            "/org/freedesktop/systemd1/unit/a_zz_2eservice",
            "/org/freedesktop/systemd1/unit/a_ff_2eservice",
        ] {
            let error = UnitError::NotAUnit(path.to_owned());
            assert_eq!(service_of_path(path), Err(error), "{path}");
        }
    }

    #[test]
    fn fuzz_unit_paths() {
        bolero::check!().with_type::<String>().for_each(|name| {
            // Escaped as sd-bus does it: a first digit and all but letters and digits.
            let unit = format!("{name}.service");
            let element: String = unit
                .bytes()
                .enumerate()
                .map(|(at, byte)| match byte {
                    b'0'..=b'9' if at > 0 => char::from(byte).to_string(),
                    b'a'..=b'z' | b'A'..=b'Z' => char::from(byte).to_string(),
                    _ => format!("_{byte:02x}"),
                })
                .collect();
            let path = format!("/org/freedesktop/systemd1/unit/{element}");
            let found = service_of_path(&path);
            assert_eq!(
                found.ok().as_ref(),
                Some(name).filter(|name| !name.is_empty())
            );
            // Whatever else arrives is a name or an error.
            drop(service_of_path(name));
        });
    }
}
