use std::os::unix::net::UnixListener;

use der::Decode as _;
use x509_cert::spki::SubjectPublicKeyInfoRef;

use super::*;
use crate::crypto::tpm::Public;
use crate::join::tests::mutilated::{Edit, mutilated};

/// A TPM that gives these answers, one after the other, and then hangs up.
fn scripted(answers: Vec<Vec<u8>>) -> (tempfile::TempDir, Env) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tpm");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; MAX];
        for answer in answers {
            if stream.read(&mut request).unwrap_or(0) == 0 {
                return;
            }
            // In two pieces, as a socket may deliver it.
            let (first, second) = answer.split_at(answer.len() / 2);
            stream.write_all(first).unwrap();
            stream.write_all(second).unwrap();
        }
    });
    let env = [(VARIABLE, path.to_str().unwrap())].into_iter().collect();
    (directory, env)
}

fn response(code: u32, body: &[u8]) -> Vec<u8> {
    Writer::default()
        .u16(0x8001)
        .u32(length(body) + 10)
        .u32(code)
        .bytes(body)
        .done()
}

fn read_public(answers: Vec<Vec<u8>>) -> Result<Option<Vec<u8>>, String> {
    let (_directory, env) = scripted(answers);
    let mut chip = Chip::open(&env).unwrap();
    chip.read_public(0x8101_0001)
        .map_err(|error| error.to_string())
}

#[test]
fn answers_and_refusals() {
    let good = response(0, &Writer::default().sized(b"key").done());
    assert_eq!(read_public(vec![good.clone()]), Ok(Some(b"key".to_vec())));
    // Handle 1: there is none.
    assert_eq!(read_public(vec![response(0x18b, b"")]), Ok(None));
    assert_eq!(
        read_public(vec![response(0x922, b""), response(0x908, b""), good]),
        Ok(Some(b"key".to_vec()))
    );
    for (code, expected) in [
        (0x921, "locked out"),
        (0x100, "startup-clear"),
        (0x902, "/dev/tpmrm0"),
        (0x9a2, "has a password"),
        (0x185, "disabled"),
        (0x12f, "code 0x12f"),
    ] {
        let error = read_public(vec![response(code, b"")]).unwrap_err();
        assert!(error.contains(expected), "{error}");
        assert!(error.contains("TPM2_ReadPublic"), "{error}");
    }
}

#[test]
fn what_is_no_answer_is_refused() {
    for bad in [
        response(0, &[0, 9, 1]),
        // Says that it is longer than any answer may be, or shorter than what came.
        [&[0x80, 0x01, 0, 0, 0x10, 1][..], &[0; 20]].concat(),
        [&[0x80, 0x01, 0, 0, 0, 4][..], &[0; 20]].concat(),
        vec![0; 3],
    ] {
        let error = read_public(vec![bad]).unwrap_err();
        assert!(error.contains("malformed"), "{error}");
    }
    let error = read_public(vec![response(0x922, b""); 9]).unwrap_err();
    assert!(error.contains("0x922"), "{error}");
}

#[test]
fn a_tpm_that_is_not_there_is_told_with_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none");
    let env = [(VARIABLE, path.to_str().unwrap())].into_iter().collect();
    let error = Chip::open(&env).unwrap_err().to_string();
    assert!(
        error.contains("none") && error.contains("No such file"),
        "{error}"
    );
    let error = |kind| {
        ChipError::Io {
            path: "/dev/tpmrm0".into(),
            source: io::Error::from(kind),
        }
        .to_string()
    };
    assert!(error(io::ErrorKind::PermissionDenied).contains("usermod -aG tss"));
    assert!(error(io::ErrorKind::ResourceBusy).contains("/dev/tpmrm0, several"));
    assert!(ChipError::Absent.to_string().contains("--device"));
}

/// A TPM that gives these answers, whatever it is asked.
struct Deaf {
    answers: std::vec::IntoIter<Vec<u8>>,
    pending: std::collections::VecDeque<u8>,
}

impl Write for Deaf {
    fn write(&mut self, request: &[u8]) -> io::Result<usize> {
        self.pending.extend(self.answers.next().unwrap_or_default());
        Ok(request.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Deaf {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.pending.read(room)
    }
}

fn deaf(answers: Vec<Vec<u8>>) -> Chip {
    Chip {
        channel: Box::new(Deaf {
            answers: answers.into_iter(),
            pending: std::collections::VecDeque::new(),
        }),
        path: "/dev/none".into(),
        loaded: Vec::new(),
    }
}

/// The parameters of an answer to a command with a session: their length in front.
fn measured(parameters: &[u8]) -> Vec<u8> {
    Writer::default()
        .u32(length(parameters))
        .bytes(parameters)
        .bytes(&[0, 0, 1, 0, 0])
        .done()
}

/// What a TPM says to the commands of [`ask`].
fn samples() -> Vec<Vec<u8>> {
    let public = Writer::default()
        .u16(alg::RSA)
        .u16(alg::SHA256)
        .u32(0x0005_0472)
        .sized(b"")
        .u16(alg::NULL)
        .u16(alg::RSASSA)
        .u16(alg::SHA256)
        .u16(2048)
        .u32(0)
        .sized(&[0xa5; 256])
        .done();
    let nv = Writer::default()
        .u32(0x01c0_0002)
        .u16(alg::SHA256)
        .u32(0)
        .sized(b"")
        .u16(600)
        .done();
    let created = Writer::default()
        .sized(&public)
        .sized(b"creation data")
        .sized(b"creation hash")
        .u16(0x8021)
        .u32(handle::NULL)
        .sized(b"ticket")
        .sized(b"name")
        .done();
    let sized = |bytes: &[u8]| Writer::default().sized(bytes).done();
    let at = |handle: u32, rest: &[u8]| Writer::default().u32(handle).bytes(rest).done();
    [
        [sized(&nv), sized(b"name")].concat(),
        measured(&sized(&[1; 512])),
        measured(&sized(&[2; 88])),
        [sized(&public), sized(b"name"), sized(b"name")].concat(),
        at(0x8000_0001, &measured(&created)),
        measured(&[sized(b"attest"), b"signature".to_vec()].concat()),
        at(0x0300_0001, &sized(&[0; 32])),
        measured(&[sized(b""), vec![0; 8]].concat()),
        measured(&sized(b"secret")),
    ]
    .iter()
    .map(|body| response(0, body))
    .collect()
}

/// Everything that a TPM is asked for when it joins; gives all that was read of its answers.
fn ask(chip: &mut Chip) -> Result<Vec<Vec<u8>>, ChipError> {
    let content = chip.read_nv(0x01c0_0002)?.unwrap_or_default();
    let ek = chip.read_public(0x8101_0001)?.unwrap_or_default();
    let created = chip.create_primary(Hierarchy::Null, b"template")?;
    let (attest, signature) = chip.certify_creation(&created, alg::RSASSA)?;
    let secret = chip.activate_credential(created.handle, 0x8101_0001, b"credential", b"secret")?;
    Ok(vec![
        content,
        ek,
        created.public,
        created.creation_data,
        created.creation_hash,
        created.ticket,
        attest,
        signature,
        secret,
    ])
}

#[test]
fn fuzz_answers_of_tpms() {
    let samples = samples();
    assert_eq!(ask(&mut deaf(samples.clone())).unwrap()[8], b"secret");
    let check = bolero::check!().with_type::<(u8, bool, Vec<Edit>)>();
    check.for_each(|(which, mend, edits)| {
        let mut answers = samples.clone();
        let at = usize::from(*which) % answers.len();
        let mut answer = mutilated(&answers[at], edits);
        if *mend && answer.len() >= 10 {
            let size = length(&answer).to_be_bytes();
            answer[2..6].copy_from_slice(&size);
        }
        answers[at] = answer;
        let Ok(read) = ask(&mut deaf(answers.clone())) else {
            return;
        };
        let (content, parts) = read.split_first().unwrap();
        assert!(content.len() <= usize::from(MAX_NV));
        for part in parts.iter().filter(|part| !part.is_empty()) {
            let said = |answer: &Vec<u8>| answer.windows(part.len()).any(|it| it == *part);
            assert!(answers.iter().any(said), "{part:x?} was not said");
        }
        for public in [&read[1], &read[2]] {
            if let Ok(spki) = Public::read(public).and_then(|public| public.key.spki()) {
                SubjectPublicKeyInfoRef::from_der(&spki).unwrap();
            }
        }
    });
}
