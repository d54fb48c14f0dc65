//! SSH's data types (RFC 4251 section 5), read strictly and written.

use super::ssh::SshError;

/// Reads values from the front of a message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], SshError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(SshError::Malformed)?;
        self.0 = rest;
        Ok(*head)
    }

    /// One byte.
    pub(crate) fn byte(&mut self) -> Result<u8, SshError> {
        self.array().map(u8::from_be_bytes)
    }

    /// A truth value: everything but 0 is true.
    pub(crate) fn flag(&mut self) -> Result<bool, SshError> {
        self.byte().map(|byte| byte != 0)
    }

    /// A number of 32 bits.
    pub(crate) fn u32(&mut self) -> Result<u32, SshError> {
        self.array().map(u32::from_be_bytes)
    }

    /// A number of 64 bits.
    pub(crate) fn u64(&mut self) -> Result<u64, SshError> {
        self.array().map(u64::from_be_bytes)
    }

    /// Bytes with their length in front.
    pub(crate) fn string(&mut self) -> Result<&'a [u8], SshError> {
        let length = usize::try_from(self.u32()?).map_err(|_source| SshError::Malformed)?;
        let (head, rest) = self.0.split_at_checked(length).ok_or(SshError::Malformed)?;
        self.0 = rest;
        Ok(head)
    }

    /// Text with its length in front.
    pub(crate) fn text(&mut self) -> Result<&'a str, SshError> {
        std::str::from_utf8(self.string()?).map_err(|_source| SshError::Malformed)
    }

    /// A positive number of any length, without leading zeros.
    pub(crate) fn number(&mut self) -> Result<&'a [u8], SshError> {
        let bytes = self.string()?;
        if bytes.first().is_some_and(|first| first & 0x80 != 0) {
            return Err(SshError::Malformed);
        }
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        Ok(bytes.get(zeros..).unwrap_or_default())
    }
}

/// Writes values one after the other.
#[derive(Debug, Clone, Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    /// A message that begins with `number`.
    pub(crate) fn message(number: u8) -> Self {
        Self(vec![number])
    }

    /// A truth value.
    #[must_use]
    pub(crate) fn flag(mut self, set: bool) -> Self {
        self.0.push(set.into());
        self
    }

    /// A number of 32 bits.
    #[must_use]
    pub(crate) fn u32(mut self, number: u32) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    /// Bytes as they are.
    #[must_use]
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Bytes with their length in front.
    #[must_use]
    pub(crate) fn string(self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.u32(length).bytes(bytes)
    }

    /// A positive number of any length, given in big-endian bytes.
    #[must_use]
    pub(crate) fn number(self, bytes: &[u8]) -> Self {
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        let bytes = bytes.get(zeros..).unwrap_or_default();
        if bytes.first().is_some_and(|first| first & 0x80 != 0) {
            self.string([&[0], bytes].concat())
        } else {
            self.string(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_a_sign_and_no_leading_zeros() {
        for (number, wire) in [
            (&[0_u8, 0, 0x7f][..], &[0_u8, 0, 0, 1, 0x7f][..]),
            (&[0x80], &[0, 0, 0, 2, 0, 0x80]),
            (&[0, 0], &[0, 0, 0, 0]),
        ] {
            let written = Writer::default().number(number).0;
            assert_eq!(written, wire);
            let significant: Vec<u8> = number.iter().copied().skip_while(|b| *b == 0).collect();
            assert_eq!(Reader(&written).number().unwrap(), significant);
        }
        assert!(Reader(&[0, 0, 0, 1, 0x80]).number().is_err(), "negative");
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        for cut in [&b""[..], b"\0\0\0", b"\0\0\0\x02a", b"\xff\xff\xff\xff"] {
            assert!(Reader(cut).string().is_err(), "{cut:?}");
        }
        assert!(Reader(b"\0\0\0\x01\xff").text().is_err());
    }

    #[test]
    fn fuzz_values() {
        let check = bolero::check!().with_type::<(Vec<u8>, String, u32, bool, Vec<u8>)>();
        check.for_each(|(bytes, text, number, flag, noise)| {
            let written = Writer::message(7)
                .string(bytes)
                .string(text)
                .u32(*number)
                .flag(*flag)
                .number(bytes);
            let mut reader = Reader(&written.0);
            assert_eq!(reader.byte().unwrap(), 7);
            assert_eq!(reader.string().unwrap(), bytes);
            assert_eq!(reader.text().unwrap(), text);
            assert_eq!(reader.u32().unwrap(), *number);
            assert_eq!(reader.flag().unwrap(), *flag);
            let significant: Vec<u8> = bytes.iter().copied().skip_while(|b| *b == 0).collect();
            assert_eq!(reader.number().unwrap(), significant);
            assert!(reader.0.is_empty());
            let mut reader = Reader(noise);
            while let Ok(value) = reader.string() {
                assert!(value.len() < noise.len());
            }
        });
    }
}
