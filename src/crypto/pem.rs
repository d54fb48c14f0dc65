//! PEM framing (RFC 7468): 64 columns, `\n` line ends, one trailing newline.

use der::pem::LineEnding;

/// A PEM block: its label and its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The text after `BEGIN`, for example `CERTIFICATE`.
    pub label: String,
    /// The decoded bytes.
    pub der: Vec<u8>,
}

/// Why a text is not PEM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PemError {
    /// A block begins but has no end line: a truncated file.
    #[error("a PEM block starts but does not end")]
    Truncated,
    /// The block's body is not base64, or its label is none.
    #[error("malformed PEM block")]
    Malformed,
}

/// Frames `der` as one PEM block.
///
/// # Panics
/// If `label` is not a PEM label; labels are constants of this program.
#[must_use]
#[expect(clippy::expect_used, reason = "labels are constants")]
pub fn encode(label: &str, der: &[u8]) -> String {
    der::pem::encode_string(label, LineEnding::LF, der).expect("a constant PEM label")
}

/// Reads every PEM block of `text`, skipping what stands between them.
///
/// # Errors
/// If a block is truncated or malformed; nothing is returned then.
pub fn decode_all(text: &str) -> Result<Vec<Block>, PemError> {
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some((_, from)) = rest.split_once("-----BEGIN ") {
        let Some((label, body)) = from.split_once("-----") else {
            return Err(PemError::Truncated);
        };
        if !is_label(label) {
            return Err(PemError::Malformed);
        }
        let end = format!("-----END {label}-----");
        let Some((body, after)) = body.split_once(end.as_str()) else {
            return Err(PemError::Truncated);
        };
        let compact: String = body.split_whitespace().collect();
        let der = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, compact)
            .map_err(|_source| PemError::Malformed)?;
        blocks.push(Block {
            label: label.to_owned(),
            der,
        });
        rest = after;
    }
    Ok(blocks)
}

/// Whether a text is a label: words of printable ASCII, a space between them. Hyphens, which RFC 7468 section 3 has as
/// well, are in none that is in use, and not in what [`encode`] takes.
fn is_label(text: &str) -> bool {
    let of_word = |byte: u8| byte.is_ascii_graphic() && byte != b'-';
    text.split(' ')
        .all(|word| !word.is_empty() && word.bytes().all(of_word))
}

/// The DER of every `CERTIFICATE` block of `text`.
///
/// # Errors
/// As [`decode_all`]; a text without any certificate gives an empty list.
pub fn certificates(text: &str) -> Result<Vec<Vec<u8>>, PemError> {
    Ok(decode_all(text)?
        .into_iter()
        .filter(|block| block.label == "CERTIFICATE")
        .map(|block| block.der)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_64_columns_and_end_in_a_newline() {
        let text = encode("CERTIFICATE", &[7; 100]);
        assert!(text.ends_with("-----END CERTIFICATE-----\n"));
        assert_eq!(text.lines().nth(1).map(str::len), Some(64));
        assert_eq!(certificates(&text), Ok(vec![vec![7; 100]]));
    }

    #[test]
    fn several_blocks_with_text_between() {
        let text = format!("a\n{}b\n{}", encode("X", b"1"), encode("CERTIFICATE", b"2"));
        let blocks = decode_all(&text).unwrap();
        assert_eq!(blocks.len(), 2);
        assert_eq!(certificates(&text).unwrap(), [b"2".to_vec()]);
    }

    #[test]
    fn what_is_no_label_is_malformed() {
        for label in ["", " X", "X ", "X  Y", "X\nY", "X\u{e4}", "X-Y", "X\u{7f}"] {
            let text = format!("-----BEGIN {label}-----\nAA==\n-----END {label}-----\n");
            assert_eq!(decode_all(&text), Err(PemError::Malformed), "{label:?}");
        }
        for label in ["X509 CRL", "OPENSSH PRIVATE KEY"] {
            assert_eq!(decode_all(&encode(label, b"1")).unwrap()[0].label, label);
        }
    }

    #[test]
    fn torn_text_is_an_error() {
        let text = encode("CERTIFICATE", &[7; 100]);
        for cut in 12..text.len() - 2 {
            let torn = text.get(..cut).unwrap();
            assert!(decode_all(torn).is_err(), "cut at {cut}");
        }
        assert_eq!(
            decode_all("-----BEGIN X-----\n!!\n-----END X-----"),
            Err(PemError::Malformed)
        );
    }
}
