//! Lets clients in that name the socket's path as the HTTP/2 authority.
//!
//! gRPC's C core (Python, C++, Ruby, …) sends `:authority: opt%2Fmachine-id%2Fworkload.sock` over a
//! unix socket, netty the path with its slashes. The h2 crate resets such a stream with
//! `PROTOCOL_ERROR` before anyone can look at it (<https://github.com/hyperium/h2/pull/487>). Nothing
//! here reads the authority, so the characters it objects to are replaced on the way in.
//!
//! A replaced character has the same length in HPACK, plain (one octet) and Huffman-coded (`%`, `/`
//! and `-` have six bits each, RFC 7541 appendix B): frames, strings and the dynamic table keep their
//! sizes, and later requests that refer to the table find the replaced value. So nothing has to be
//! decompressed, copied or remembered but the place in the frame.
//!
//! A client whose first request needs nothing replaced is not looked at again.

/// The client's connection preface (RFC 9113 section 3.4).
const PREFACE: usize = 24;
/// A frame's header (RFC 9113 section 4.1).
const FRAME_HEADER: usize = 9;
/// Frame types and flags (RFC 9113 sections 6.2 and 6.10).
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Octets of a priority in a HEADERS frame.
const PRIORITY_LENGTH: usize = 5;
/// The index of `:authority` in HPACK's static table, and the name itself: gRPC's C core spells it out.
const AUTHORITY: usize = 1;
const AUTHORITY_NAME: &[u8] = b":authority";

/// Lengths of HPACK's Huffman codes, each with the first value that is no code of that length: the
/// code is canonical. Longer codes stand for nothing printable but `\`.
const CODES: [(u32, u32); 10] = [
    (5, 0x0a),
    (6, 0x2e),
    (7, 0x7c),
    (8, 0xfe),
    (10, 0x3fd),
    (11, 0x7fd),
    (12, 0xffc),
    (13, 0x1ffe),
    (14, 0x3ffe),
    (15, 0x7fff),
];
/// `%` and `/`, Huffman-coded in six bits.
const CODED: [u32; 2] = [0b01_0101, 0b01_1000];
/// `-`, which takes their place.
const CODED_DASH: u32 = 0b01_0110;

/// The watch over what one client sends.
#[derive(Debug)]
pub(super) struct Watch {
    frame: Frame,
    field: Field,
    /// Whether the name that was spelt out last is `:authority`, as far as it has arrived.
    named: bool,
    /// Whether the client needed it so far.
    replaced: bool,
}

/// Where in the frames we are.
#[derive(Debug, Clone, Copy)]
enum Frame {
    /// Octets that hold no header fields: the preface, other frames, padding.
    Skip(usize),
    Header {
        seen: [u8; FRAME_HEADER],
        count: usize,
    },
    /// One octet with the padding's length.
    PadLength(Block),
    Priority(usize, Block),
    Fields(Block),
    /// There is nothing to replace, or this is not HTTP/2.
    Off,
}

/// The rest of a frame's header fields.
#[derive(Debug, Clone, Copy)]
struct Block {
    left: usize,
    padding: usize,
    last: bool,
}

/// Where in the header fields we are; they may go on in the next frame.
#[derive(Debug, Clone, Copy)]
enum Field {
    /// At the first octet of a representation (RFC 7541 section 6).
    Start,
    /// Inside an integer (section 5.1) that means something.
    Integer {
        value: usize,
        shift: u32,
        of: Meaning,
    },
    /// At the first octet of a string (section 5.2).
    Length { of: Text },
    /// Inside a string.
    Text { left: usize, coded: bool, of: Text },
}

#[derive(Debug, Clone, Copy)]
enum Meaning {
    /// An index that stands for a whole field, or a size: no string follows.
    Alone,
    /// The index of a name; its value follows.
    Name,
    /// The length of a string.
    Length { coded: bool, of: Text },
}

/// What a string is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Text {
    Name,
    Value,
    Authority,
}

impl Watch {
    pub(super) fn new() -> Self {
        Self {
            frame: Frame::Skip(PREFACE),
            field: Field::Start,
            named: false,
            replaced: false,
        }
    }

    /// Looks at the next octets and replaces what has to be.
    pub(super) fn look(&mut self, mut octets: &mut [u8]) {
        while !octets.is_empty() && !matches!(self.frame, Frame::Off) {
            let used = self.step(octets).clamp(1, octets.len());
            octets = octets.split_at_mut(used).1;
        }
    }

    /// One step; returns the number of octets it took.
    fn step(&mut self, octets: &mut [u8]) -> usize {
        let Some(first) = octets.first().copied() else {
            return 0;
        };
        let mut used = 1;
        self.frame = match self.frame {
            Frame::Off => Frame::Off,
            Frame::Skip(left) => {
                used = left.min(octets.len());
                Frame::skip(left - used)
            }
            Frame::Header { mut seen, count } => {
                if let Some(place) = seen.get_mut(count) {
                    *place = first;
                }
                if count + 1 < FRAME_HEADER {
                    Frame::Header {
                        seen,
                        count: count + 1,
                    }
                } else {
                    Frame::begin(seen)
                }
            }
            Frame::PadLength(block) => {
                let padding = usize::from(first);
                match block.left.checked_sub(1 + padding) {
                    Some(left) => Frame::fields(Block {
                        left,
                        padding,
                        ..block
                    }),
                    None => Frame::Off,
                }
            }
            Frame::Priority(left, block) if left > 1 => Frame::Priority(left - 1, block),
            Frame::Priority(_, block) => Frame::fields(block),
            Frame::Fields(block) => {
                let most = block.left.min(octets.len());
                used = self
                    .field(octets.split_at_mut(most).0)
                    .clamp(1, most.max(1));
                let left = block.left - used;
                if left > 0 {
                    Frame::Fields(Block { left, ..block })
                } else if block.last && !self.replaced {
                    Frame::Off
                } else {
                    Frame::skip(block.padding)
                }
            }
        };
        used
    }

    /// One step inside header fields.
    fn field(&mut self, octets: &mut [u8]) -> usize {
        let Some(first) = octets.first().copied() else {
            return 0;
        };
        let mut used = 1;
        let inside = matches!(self.field, Field::Text { .. });
        self.field = match self.field {
            // An indexed field; a literal that enters the table; a new size of the table; literals
            // that do not enter it.
            Field::Start if first & 0x80 != 0 => Field::integer(first, 7, Meaning::Alone),
            Field::Start if first & 0x40 != 0 => Field::integer(first, 6, Meaning::Name),
            Field::Start if first & 0x20 != 0 => Field::integer(first, 5, Meaning::Alone),
            Field::Start => Field::integer(first, 4, Meaning::Name),
            Field::Integer { value, shift, of } => {
                let value = usize::from(first & 0x7f)
                    .checked_shl(shift)
                    .map_or(usize::MAX, |more| value.saturating_add(more));
                if first & 0x80 == 0 {
                    Field::known(value, of)
                } else {
                    Field::Integer {
                        value,
                        shift: shift.saturating_add(7),
                        of,
                    }
                }
            }
            Field::Length { of } => {
                let coded = first & 0x80 != 0;
                Field::integer(first, 7, Meaning::Length { coded, of })
            }
            Field::Text { left, coded, of } => {
                used = left.min(octets.len());
                let part = octets.split_at_mut(used).0;
                if of == Text::Name {
                    let expected = AUTHORITY_NAME.len().checked_sub(left);
                    self.named &=
                        expected.and_then(|at| AUTHORITY_NAME.get(at..at + used)) == Some(&*part);
                } else if of == Text::Authority {
                    // A coded string that arrives in parts is left alone: characters lie across.
                    self.replaced |= match (coded, used == left) {
                        (false, _) => replace(part),
                        (true, true) => replace_coded(part),
                        (true, false) => false,
                    };
                }
                match (left - used, of) {
                    (0, Text::Name) if self.named => Field::Length {
                        of: Text::Authority,
                    },
                    (0, Text::Name) => Field::Length { of: Text::Value },
                    (0, Text::Value | Text::Authority) => Field::Start,
                    (left, _) => Field::Text { left, coded, of },
                }
            }
        };
        if let (false, Field::Text { left, coded, .. }) = (inside, self.field) {
            self.named = left == AUTHORITY_NAME.len() && !coded;
        }
        used
    }
}

impl Frame {
    fn skip(left: usize) -> Self {
        if left > 0 {
            Self::Skip(left)
        } else {
            Self::Header {
                seen: [0; FRAME_HEADER],
                count: 0,
            }
        }
    }

    /// What follows a frame's header.
    fn begin(header: [u8; FRAME_HEADER]) -> Self {
        let [high, middle, low, kind, flags, ..] = header;
        let left = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        let block = Block {
            left,
            padding: 0,
            last: flags & END_HEADERS != 0,
        };
        match kind {
            HEADERS if flags & PRIORITY != 0 && flags & PADDED == 0 => {
                match left.checked_sub(PRIORITY_LENGTH) {
                    Some(left) => Self::Priority(PRIORITY_LENGTH, Block { left, ..block }),
                    None => Self::Off,
                }
            }
            // No client is known to send both; one that does is served as without this watch.
            HEADERS if flags & PRIORITY != 0 => Self::Off,
            HEADERS if flags & PADDED != 0 => Self::PadLength(block),
            HEADERS | CONTINUATION => Self::fields(block),
            _ => Self::skip(left),
        }
    }

    fn fields(block: Block) -> Self {
        if block.left > 0 {
            Self::Fields(block)
        } else {
            Self::skip(block.padding)
        }
    }
}

impl Field {
    /// An integer whose first octet has `bits` bits of it.
    fn integer(first: u8, bits: u32, of: Meaning) -> Self {
        let mask = usize::from(u8::MAX >> (8 - bits));
        let value = usize::from(first) & mask;
        if value < mask {
            Self::known(value, of)
        } else {
            Self::Integer {
                value,
                shift: 0,
                of,
            }
        }
    }

    /// What follows an integer.
    fn known(value: usize, of: Meaning) -> Self {
        match of {
            Meaning::Alone => Self::Start,
            Meaning::Name if value == 0 => Self::Length { of: Text::Name },
            Meaning::Name if value == AUTHORITY => Self::Length {
                of: Text::Authority,
            },
            Meaning::Name => Self::Length { of: Text::Value },
            Meaning::Length { of: Text::Name, .. } if value == 0 => {
                Self::Length { of: Text::Value }
            }
            Meaning::Length { .. } if value == 0 => Self::Start,
            Meaning::Length { coded, of } => Self::Text {
                left: value,
                coded,
                of,
            },
        }
    }
}

/// Replaces in a plain string; says whether there was anything.
fn replace(text: &mut [u8]) -> bool {
    let mut replaced = false;
    for octet in text {
        if matches!(octet, b'%' | b'/') {
            *octet = b'-';
            replaced = true;
        }
    }
    replaced
}

/// Replaces in a whole Huffman-coded string; says whether there was anything.
fn replace_coded(text: &mut [u8]) -> bool {
    let bits = text.len() * 8;
    let mut replaced = false;
    let mut at = 0;
    while at < bits {
        let Some((length, code)) = code_at(text, at) else {
            break;
        };
        if length == 6 && CODED.contains(&code) {
            let change = code ^ CODED_DASH;
            for bit in 0..6 {
                if change >> (5 - bit) & 1 == 1
                    && let Some(octet) = text.get_mut((at + bit) / 8)
                {
                    *octet ^= 0x80 >> ((at + bit) % 8);
                }
            }
            replaced = true;
        }
        at += length;
    }
    replaced
}

/// The code that begins at a bit: its length and value. `None` at the padding and at codes that no
/// authority holds.
fn code_at(text: &[u8], at: usize) -> Option<(usize, u32)> {
    let mut value = 0;
    let mut length = 0;
    for (bits, end) in CODES {
        while length < bits {
            let bit = at + usize::try_from(length).ok()?;
            let octet = text.get(bit / 8)?;
            value = value << 1 | u32::from(octet >> (7 - bit % 8) & 1);
            length += 1;
        }
        if value < end {
            return Some((usize::try_from(length).ok()?, value));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &[u8] = b"opt%2Fmachine-id%2Fworkload.sock";
    const FIXED: &[u8] = b"opt-2Fmachine-id-2Fworkload.sock";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let [.., high, middle, low] = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = vec![high, middle, low, kind, flags, 0, 0, 0, 1];
        frame.extend(payload);
        frame
    }

    /// `:method POST`, a literal with a literal name, a dynamic table size, then the authority.
    fn block(authority: &[u8]) -> Vec<u8> {
        let mut block = vec![0x83, 0x40, 1, b'x', 2, b'%', b'/', 0x3f, 0xe1, 0x1f, 0x41];
        block.push(u8::try_from(authority.len()).unwrap());
        block.extend(authority);
        // `:path`, whose slashes and percent signs mean something.
        block.extend(b"\x44\x04/a%b");
        block
    }

    fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut octets = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        octets.extend(frame(4, 0, &[0, 3, 0, 0, 0, 100]));
        octets.extend(frames.concat());
        octets
    }

    fn watched(mut octets: Vec<u8>, portion: usize) -> Vec<u8> {
        let mut watch = Watch::new();
        for part in octets.chunks_mut(portion) {
            watch.look(part);
        }
        octets
    }

    #[test]
    fn a_path_becomes_an_authority_however_it_arrives() {
        let split = block(PATH);
        let (one, two) = split.split_at(20);
        let fixed = block(FIXED);
        let (fixed_one, fixed_two) = fixed.split_at(20);
        let padded = |block: &[u8]| [&[3], block, b"%%%"].concat();
        let prioritised = |block: &[u8]| [b"%/%/%".as_slice(), block].concat();
        for (sent, wanted) in [
            (
                vec![frame(HEADERS, END_HEADERS, &split)],
                vec![frame(HEADERS, END_HEADERS, &fixed)],
            ),
            (
                vec![
                    frame(HEADERS, 0, one),
                    frame(CONTINUATION, END_HEADERS, two),
                ],
                vec![
                    frame(HEADERS, 0, fixed_one),
                    frame(CONTINUATION, END_HEADERS, fixed_two),
                ],
            ),
            (
                vec![frame(HEADERS, END_HEADERS | PADDED, &padded(&split))],
                vec![frame(HEADERS, END_HEADERS | PADDED, &padded(&fixed))],
            ),
            (
                vec![frame(HEADERS, END_HEADERS | PRIORITY, &prioritised(&split))],
                vec![frame(HEADERS, END_HEADERS | PRIORITY, &prioritised(&fixed))],
            ),
            // Data in between, and again in a later request.
            (
                vec![
                    frame(HEADERS, END_HEADERS, &split),
                    frame(0, 0, b"%/%/"),
                    frame(HEADERS, END_HEADERS, &split),
                ],
                vec![
                    frame(HEADERS, END_HEADERS, &fixed),
                    frame(0, 0, b"%/%/"),
                    frame(HEADERS, END_HEADERS, &fixed),
                ],
            ),
        ] {
            for portion in [1, 2, 7, 1000] {
                assert_eq!(
                    watched(connection(&sent), portion),
                    connection(&wanted),
                    "in portions of {portion}"
                );
            }
        }
        assert!(http::uri::Authority::from_maybe_shared(FIXED).is_ok());
        assert!(http::uri::Authority::from_maybe_shared(PATH).is_err());
    }

    #[test]
    fn the_names_own_spelling_is_known() {
        let spelt = |name: &[u8], value: &[u8]| {
            let lengths = [name, value].map(|text| u8::try_from(text.len()).unwrap());
            let block = [&[0x40, lengths[0]], name, &[lengths[1]], value].concat();
            connection(&[frame(HEADERS, END_HEADERS, &block)])
        };
        for portion in [1, 3, 4, 1000] {
            assert_eq!(
                watched(spelt(b":authority", PATH), portion),
                spelt(b":authority", FIXED)
            );
            for other in [
                b":Authority".as_slice(),
                b"uthority",
                b"a:authority",
                b":authorityy",
            ] {
                let sent = spelt(other, PATH);
                assert_eq!(watched(sent.clone(), portion), sent, "{other:?}");
            }
        }
    }

    #[test]
    fn a_client_with_a_good_authority_is_left_alone() {
        let good = frame(HEADERS, END_HEADERS, &block(b"localhost"));
        let sent = connection(&[good, frame(HEADERS, END_HEADERS, &block(PATH))]);
        assert_eq!(watched(sent.clone(), 5), sent);
    }

    #[test]
    fn huffman_coded_authorities_too() {
        // "/a.s", coded: 011000 00011 010111 01000, padded with ones.
        let mut coded = [0b0110_0000, 0b0110_1011, 0b1010_0011];
        assert!(replace_coded(&mut coded));
        assert_eq!(coded, [0b0101_1000, 0b0110_1011, 0b1010_0011]);
        // "a%", whose `%` lies across two octets: 00011 010101.
        let mut coded = [0b0001_1010, 0b1011_1111];
        assert!(replace_coded(&mut coded));
        assert_eq!(coded, [0b0001_1010, 0b1101_1111]);
        // RFC 7541 C.4.1: www.example.com
        let example = [
            0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff,
        ];
        let mut coded = example;
        assert!(!replace_coded(&mut coded));
        assert_eq!(coded, example);
    }

    #[test]
    fn nonsense_ends_nothing_and_changes_nothing() {
        let mut random = 1_u32;
        for length in 0..2000 {
            let octets: Vec<u8> = (0..length)
                .map(|_| {
                    random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    random.to_be_bytes()[0]
                })
                .collect();
            assert_eq!(watched(octets, 3).len(), length);
        }
        let endless = vec![0xff; 300];
        let sent = connection(&[frame(HEADERS, END_HEADERS, &endless)]);
        assert_eq!(watched(sent.clone(), 9), sent);
        // Padding longer than its frame.
        let sent = connection(&[frame(HEADERS, END_HEADERS | PADDED, b"\xff%")]);
        assert_eq!(watched(sent.clone(), 9), sent);
    }

    #[test]
    fn fuzz_what_a_client_sends() {
        /// A frame: kind, flags, header block or noise, whether it is framed at all.
        type Piece = (u8, u8, Vec<u8>, u8);
        let check = bolero::check!().with_type::<(Vec<Piece>, Vec<u8>)>();
        check.for_each(|(pieces, portions)| {
            let frames: Vec<Vec<u8>> = pieces
                .iter()
                .take(8)
                .map(|(kind, flags, noise, form)| match form % 4 {
                    0 => frame(HEADERS, END_HEADERS, &block(PATH)),
                    1 => frame(u8::from(*kind > 99) * 4, *flags, noise),
                    2 => frame(HEADERS, *flags, &[&block(PATH), &noise[..]].concat()),
                    _ => noise.clone(),
                })
                .collect();
            let orderly = pieces.iter().take(8).all(|(.., form)| form % 4 < 2);
            let sent = connection(&frames);
            let whole = watched(sent.clone(), usize::MAX);
            assert_eq!(whole.len(), sent.len());
            // However it arrives, the same comes out; but for Huffman-coded authorities that arrive in
            // parts, which no client sends.
            let mut parts = sent.clone();
            let mut watch = Watch::new();
            let (mut rest, mut lengths) = (&mut parts[..], portions.iter().cycle());
            while !rest.is_empty() {
                let length = usize::from(*lengths.next().unwrap_or(&1)).clamp(1, rest.len());
                let (part, after) = rest.split_at_mut(length);
                watch.look(part);
                rest = after;
            }
            assert_eq!(parts.len(), whole.len());
            assert!(!orderly || parts == whole, "{sent:?}");
            // Nothing is left to replace.
            assert_eq!(watched(whole.clone(), usize::MAX), whole);
        });
    }
}
