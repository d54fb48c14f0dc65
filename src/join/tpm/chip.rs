//! A TPM 2.0 on the other side of a device or socket: the few commands that joining needs (TCG
//! "TPM 2.0 Library", part 3). Calls block; whoever has an async thread runs them beside it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::crypto::tpm::{Malformed, Reader, Writer, alg};
use crate::env::Env;

/// Names the TPM where it is none of [`DEVICES`]: a device, or the unix socket of an emulator.
pub(super) const VARIABLE: &str = "TBOT_TPM";
/// Where Linux has the TPM: through the kernel's resource manager, which any number of programs may
/// use at once, or bare.
const DEVICES: [&str; 2] = ["/dev/tpmrm0", "/dev/tpm0"];
/// The longest command or response (part 2, `TPM2_MAX_COMMAND_SIZE`).
const MAX: usize = 4096;
/// How long an emulator may take over one command. A device bounds itself.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a command is sent again when the TPM asks for that.
const RETRIES: u32 = 5;
/// What one read of NV memory may ask for; every TPM answers that much.
const NV_CHUNK: u16 = 512;
/// The longest content of an NV index that is read.
const MAX_NV: u16 = 16 * 1024;

/// Handles with a fixed meaning (`TPM_RH`, `TPM_RS`).
mod handle {
    pub(super) const NULL: u32 = 0x4000_0007;
    pub(super) const PASSWORD: u32 = 0x4000_0009;
    pub(super) const ENDORSEMENT: u32 = 0x4000_000b;
}

/// Command codes (`TPM_CC`).
mod code {
    pub(super) const CREATE_PRIMARY: u32 = 0x131;
    pub(super) const ACTIVATE_CREDENTIAL: u32 = 0x147;
    pub(super) const CERTIFY_CREATION: u32 = 0x14a;
    pub(super) const NV_READ: u32 = 0x14e;
    pub(super) const POLICY_SECRET: u32 = 0x151;
    pub(super) const FLUSH_CONTEXT: u32 = 0x165;
    pub(super) const NV_READ_PUBLIC: u32 = 0x169;
    pub(super) const READ_PUBLIC: u32 = 0x173;
    pub(super) const START_AUTH_SESSION: u32 = 0x176;
}

/// Why a TPM did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ChipError {
    /// None of the places has one.
    #[error(
        "no TPM 2.0: neither {} nor {} exists. Is it switched on in the firmware? A virtual machine needs a vTPM, a container the device (`--device /dev/tpmrm0`)",
        DEVICES[0],
        DEVICES[1]
    )]
    Absent,
    /// It could not be opened or spoken to.
    #[error("TPM {}: {source}{}", .path.display(), remedy(.source))]
    Io {
        /// The device or socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It refused a command.
    #[error("the TPM refused {command} with code {code:#05x}{}", meaning(*.code))]
    Refused {
        /// The command's name.
        command: &'static str,
        /// The response code.
        code: u32,
    },
    /// Its answer is none.
    #[error("the TPM's answer to {command} is malformed")]
    Malformed {
        /// The command's name.
        command: &'static str,
    },
}

impl ChipError {
    /// The kind of a response code that names a parameter, handle or session (part 2, 6.6).
    fn kind(&self) -> Option<u32> {
        match self {
            Self::Refused { code, .. } if code & 0x80 != 0 => Some(code & 0x3f),
            _ => None,
        }
    }

    /// Whether nothing stands at a handle that was asked about.
    fn is_no_such_handle(&self) -> bool {
        self.kind() == Some(0x0b)
    }

    /// Whether the TPM has no keys of the kind asked for: asymmetric, value, key size, type, scheme or
    /// curve not supported.
    pub(super) fn is_unsupported(&self) -> bool {
        matches!(self.kind(), Some(0x01 | 0x04 | 0x07 | 0x0a | 0x12 | 0x26))
    }
}

fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            ". Add the user that tbot runs as to the group of the device (`tss` on most systems: \
             `usermod -aG tss USER`, or `SupplementaryGroups=tss` in the unit)"
        }
        io::ErrorKind::ResourceBusy => {
            ". Another program holds it; through the kernel's resource manager, /dev/tpmrm0, several \
             programs can share a TPM"
        }
        _ => "",
    }
}

/// What the codes that administrators meet mean.
fn meaning(code: u32) -> &'static str {
    match code {
        0x100 => " (it was not started: an emulator wants `--flags startup-clear`)",
        0x101 => " (it is in failure mode and wants a reset)",
        0x902 | 0x903 => {
            " (its memory is full of other programs' keys or sessions: use /dev/tpmrm0, or flush them with tpm2_flushcontext)"
        }
        0x921 => {
            " (it is locked out after wrong passwords: wait, or reset it with tpm2_dictionarylockout --clear-lockout)"
        }
        0x923 => " (it cannot write its memory now)",
        code if code & 0x80 != 0 => match code & 0x3f {
            0x05 => " (its endorsement hierarchy is disabled)",
            0x0e | 0x22 => {
                " (its endorsement hierarchy has a password; joining needs it to have none)"
            }
            0x0b => " (nothing is at that handle)",
            _ => "",
        },
        _ => "",
    }
}

/// A key that the TPM just made.
#[derive(Debug)]
pub(super) struct Created {
    /// Where it is loaded.
    pub(super) handle: u32,
    /// `TPMT_PUBLIC`.
    pub(super) public: Vec<u8>,
    /// `TPMS_CREATION_DATA`.
    pub(super) creation_data: Vec<u8>,
    creation_hash: Vec<u8>,
    /// `TPMT_TK_CREATION`.
    ticket: Vec<u8>,
}

/// Whose seed a primary key comes from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hierarchy {
    /// The manufacturer's: the same key each time.
    Endorsement,
    /// Nobody's: gone at the next start of the machine.
    Null,
}

trait Channel: Read + Write + Send + Sync {}
impl<T: Read + Write + Send + Sync> Channel for T {}

/// An open TPM. What was loaded into it is taken out again when this goes away.
pub(super) struct Chip {
    channel: Box<dyn Channel>,
    path: PathBuf,
    loaded: Vec<u32>,
}

impl fmt::Debug for Chip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Chip").field(&self.path).finish()
    }
}

impl Chip {
    /// Opens the machine's TPM.
    pub(super) fn open(env: &Env) -> Result<Self, ChipError> {
        let path = match env.get(VARIABLE) {
            Some(path) => Path::new(path),
            None => DEVICES
                .iter()
                .map(Path::new)
                .find(|path| path.exists())
                .ok_or(ChipError::Absent)?,
        };
        let channel = channel(path).map_err(|source| ChipError::Io {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            channel,
            path: path.to_owned(),
            loaded: Vec::new(),
        })
    }

    /// The content of an NV index; `None` where there is no such index.
    pub(super) fn read_nv(&mut self, index: u32) -> Result<Option<Vec<u8>>, ChipError> {
        let read = Command::new("TPM2_NV_ReadPublic", code::NV_READ_PUBLIC).handle(index);
        let answer = match self.run(&read) {
            Ok(answer) => answer,
            Err(error) if error.is_no_such_handle() => return Ok(None),
            Err(error) => return Err(error),
        };
        let size = read.parse(|| {
            let mut public = Reader::new(Reader::new(&answer).sized()?);
            public.take(4 + 2 + 4)?;
            public.sized()?;
            public.u16()
        })?;
        let mut content = Vec::new();
        let mut offset = 0;
        while offset < size.min(MAX_NV) {
            let wanted = (size - offset).min(NV_CHUNK);
            let read = Command::new("TPM2_NV_Read", code::NV_READ)
                .handle(index)
                .handle(index)
                .with_password()
                .parameters(Writer::default().u16(wanted).u16(offset));
            let answer = self.run(&read)?;
            let part = read.parse(|| Ok(Reader::new(&answer).sized()?.to_vec()))?;
            if part.len() != usize::from(wanted) {
                return Err(read.malformed());
            }
            content.extend_from_slice(&part);
            offset += wanted;
        }
        Ok(Some(content))
    }

    /// The public area of the key at a handle; `None` where there is no key.
    pub(super) fn read_public(&mut self, handle: u32) -> Result<Option<Vec<u8>>, ChipError> {
        let read = Command::new("TPM2_ReadPublic", code::READ_PUBLIC).handle(handle);
        match self.run(&read) {
            Ok(answer) => read
                .parse(|| Ok(Reader::new(&answer).sized()?.to_vec()))
                .map(Some),
            Err(error) if error.is_no_such_handle() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a primary key from a `TPMT_PUBLIC` as template.
    pub(super) fn create_primary(
        &mut self,
        hierarchy: Hierarchy,
        template: &[u8],
    ) -> Result<Created, ChipError> {
        let hierarchy = match hierarchy {
            Hierarchy::Endorsement => handle::ENDORSEMENT,
            Hierarchy::Null => handle::NULL,
        };
        let no_secrets = Writer::default().sized(b"").sized(b"").done();
        let create = Command::new("TPM2_CreatePrimary", code::CREATE_PRIMARY)
            .handle(hierarchy)
            .with_password()
            .gives_handle()
            .parameters(
                Writer::default()
                    .sized(&no_secrets)
                    .sized(template)
                    .sized(b"")
                    .u32(0),
            );
        let answer = self.run(&create)?;
        let created = create.parse(|| {
            let mut reader = Reader::new(&answer);
            let handle = reader.u32()?;
            let public = reader.sized()?.to_vec();
            let creation_data = reader.sized()?.to_vec();
            let creation_hash = reader.sized()?.to_vec();
            let from = reader.rest();
            reader.take(2 + 4)?;
            reader.sized()?;
            let ticket = from.len() - reader.rest().len();
            Ok(Created {
                handle,
                public,
                creation_data,
                creation_hash,
                ticket: from.get(..ticket).ok_or(Malformed)?.to_vec(),
            })
        })?;
        self.loaded.push(created.handle);
        Ok(created)
    }

    /// Has a key just made sign that it was made here: `TPMS_ATTEST` and `TPMT_SIGNATURE`.
    /// `signs_with` is the signature scheme of the key.
    pub(super) fn certify_creation(
        &mut self,
        key: &Created,
        signs_with: u16,
    ) -> Result<(Vec<u8>, Vec<u8>), ChipError> {
        let certify = Command::new("TPM2_CertifyCreation", code::CERTIFY_CREATION)
            .handle(key.handle)
            .handle(key.handle)
            .with_password()
            .parameters(
                Writer::default()
                    .sized(b"")
                    .sized(&key.creation_hash)
                    .u16(signs_with)
                    .u16(alg::SHA256)
                    .bytes(&key.ticket),
            );
        let answer = self.run(&certify)?;
        certify.parse(|| {
            let mut reader = Reader::new(&answer);
            let attest = reader.sized()?.to_vec();
            Ok((attest, reader.rest().to_vec()))
        })
    }

    /// Opens a credential that was made for endorsement key `ek` and the name of key `ak`. Both
    /// arguments are without their lengths.
    pub(super) fn activate_credential(
        &mut self,
        ak: u32,
        ek: u32,
        credential: &[u8],
        secret: &[u8],
    ) -> Result<Vec<u8>, ChipError> {
        let start = Command::new("TPM2_StartAuthSession", code::START_AUTH_SESSION)
            .handle(handle::NULL)
            .handle(handle::NULL)
            .gives_handle()
            .parameters(
                Writer::default()
                    .sized(&crate::crypto::random::<16>())
                    .sized(b"")
                    .u8(1) // TPM_SE_POLICY
                    .u16(alg::NULL)
                    .u16(alg::SHA256),
            );
        let answer = self.run(&start)?;
        let session = start.parse(|| Reader::new(&answer).u32())?;
        self.loaded.push(session);

        // The policy of every endorsement key of the standard templates.
        let policy = Command::new("TPM2_PolicySecret", code::POLICY_SECRET)
            .handle(handle::ENDORSEMENT)
            .handle(session)
            .with_password()
            .parameters(Writer::default().sized(b"").sized(b"").sized(b"").u32(0));
        self.run(&policy)?;

        let activate = Command::new("TPM2_ActivateCredential", code::ACTIVATE_CREDENTIAL)
            .handle(ak)
            .handle(ek)
            .with_password()
            .with_session(session)
            .parameters(Writer::default().sized(credential).sized(secret));
        let answer = self.run(&activate)?;
        activate.parse(|| Ok(Reader::new(&answer).sized()?.to_vec()))
    }

    /// Runs a command; the answer is its handle, if it gives one, and its parameters.
    fn run(&mut self, command: &Command) -> Result<Vec<u8>, ChipError> {
        let request = command.encode();
        let mut left = RETRIES;
        loop {
            let response = self
                .exchange(&request)
                .map_err(|source| match source.kind() {
                    io::ErrorKind::InvalidData => command.malformed(),
                    _ => ChipError::Io {
                        path: self.path.clone(),
                        source,
                    },
                })?;
            let (code, body) = command.parse(|| {
                let mut reader = Reader::new(&response);
                reader.take(2 + 4)?;
                Ok((reader.u32()?, reader.rest()))
            })?;
            match code {
                0 => return command.parse(|| command.answer(body)),
                // Yielded, retry: the same command, please.
                0x908 | 0x922 if left > 0 => left -= 1,
                code => {
                    return Err(ChipError::Refused {
                        command: command.name,
                        code,
                    });
                }
            }
        }
    }

    /// Sends a command and reads the whole response.
    fn exchange(&mut self, request: &[u8]) -> io::Result<Vec<u8>> {
        let no_response = || io::Error::from(io::ErrorKind::InvalidData);
        self.channel.write_all(request)?;
        self.channel.flush()?;
        let mut response = vec![0; MAX];
        let mut filled = 0;
        loop {
            let room = response.get_mut(filled..).unwrap_or_default();
            match self.channel.read(room) {
                Ok(0) => return Err(no_response()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            let mut header = Reader::new(response.get(..filled).unwrap_or_default());
            let Ok(size) = header.take(2).and_then(|_tag| header.u32()) else {
                continue;
            };
            let size = usize::try_from(size).map_err(|_source| no_response())?;
            if size > MAX || filled > size {
                return Err(no_response());
            }
            if filled == size {
                response.truncate(size);
                return Ok(response);
            }
        }
    }
}

impl Drop for Chip {
    fn drop(&mut self) {
        for handle in std::mem::take(&mut self.loaded) {
            let flush = Command::new("TPM2_FlushContext", code::FLUSH_CONTEXT).handle(handle);
            if let Err(error) = self.run(&flush) {
                tracing::debug!(%error, "Cannot take a key or session out of the TPM");
            }
        }
    }
}

fn channel(path: &Path) -> io::Result<Box<dyn Channel>> {
    if std::fs::metadata(path)?.file_type().is_socket() {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        return Ok(Box::new(socket));
    }
    let device = File::options().read(true).write(true).open(path)?;
    Ok(Box::new(device))
}

/// A command on its way.
struct Command {
    name: &'static str,
    code: u32,
    handles: Vec<u32>,
    sessions: Vec<u32>,
    parameters: Vec<u8>,
    gives_handle: bool,
}

impl Command {
    fn new(name: &'static str, code: u32) -> Self {
        Self {
            name,
            code,
            handles: Vec::new(),
            sessions: Vec::new(),
            parameters: Vec::new(),
            gives_handle: false,
        }
    }

    fn handle(mut self, handle: u32) -> Self {
        self.handles.push(handle);
        self
    }

    /// The next handle is used with its (empty) password.
    fn with_password(self) -> Self {
        self.with_session(handle::PASSWORD)
    }

    fn with_session(mut self, session: u32) -> Self {
        self.sessions.push(session);
        self
    }

    fn parameters(mut self, parameters: Writer) -> Self {
        self.parameters = parameters.done();
        self
    }

    fn gives_handle(mut self) -> Self {
        self.gives_handle = true;
        self
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = Writer::default().u32(self.code);
        for handle in &self.handles {
            body = body.u32(*handle);
        }
        if !self.sessions.is_empty() {
            let mut area = Writer::default();
            for session in &self.sessions {
                // No nonce, "goes on", no password and no HMAC.
                area = area.u32(*session).sized(b"").u8(1).sized(b"");
            }
            let area = area.done();
            body = body.u32(length(&area)).bytes(&area);
        }
        let body = body.bytes(&self.parameters).done();
        let tag = if self.sessions.is_empty() {
            0x8001
        } else {
            0x8002
        };
        Writer::default()
            .u16(tag)
            .u32(length(&body) + 2 + 4)
            .bytes(&body)
            .done()
    }

    /// A successful response's handle and parameters, without what belongs to its sessions.
    fn answer(&self, body: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut reader = Reader::new(body);
        let mut answer = Vec::new();
        if self.gives_handle {
            answer.extend_from_slice(reader.take(4)?);
        }
        let parameters = if self.sessions.is_empty() {
            reader.rest()
        } else {
            let length = reader.u32()?;
            reader.take(usize::try_from(length).map_err(|_source| Malformed)?)?
        };
        answer.extend_from_slice(parameters);
        Ok(answer)
    }

    fn parse<T>(&self, read: impl FnOnce() -> Result<T, Malformed>) -> Result<T, ChipError> {
        read().map_err(|Malformed| self.malformed())
    }

    fn malformed(&self) -> ChipError {
        ChipError::Malformed { command: self.name }
    }
}

/// Nothing that is sent comes near the range of the number.
fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
