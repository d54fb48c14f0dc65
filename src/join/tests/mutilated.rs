//! Samples with mistakes in them, for the parsers of what comes from outside.

/// A change of a sample: where, what, and how.
pub(in crate::join) type Edit = (u16, u8, u8);

/// A sample with some octets changed, added, left out or doubled, or its end cut off.
pub(in crate::join) fn mutilated(sample: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut bytes = sample.to_vec();
    for (place, octet, how) in edits.iter().take(6) {
        let at = usize::from(*place) % (bytes.len() + 1);
        match how % 8 {
            0 => bytes.insert(at, *octet),
            1 if at < bytes.len() => drop(bytes.remove(at)),
            2 => bytes.truncate(at),
            3 => {
                let part: Vec<u8> = bytes[at..]
                    .iter()
                    .copied()
                    .take(usize::from(*octet))
                    .collect();
                bytes.splice(at..at, part);
            }
            _ if at < bytes.len() => bytes[at] = *octet,
            _ => {}
        }
    }
    bytes
}
