//! A file that is held, not opened: a socket cannot be.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, Stat, XattrFlags, fstat, getxattr, open, setxattr};
use rustix::io::Errno;

use super::acl::{self, Acl};

/// The file of a socket. What is done with it is done with this file, whatever stands at its path by then.
#[derive(Debug)]
pub struct SocketFile(OwnedFd);

impl SocketFile {
    /// Holds the socket at `path`.
    ///
    /// # Errors
    /// If none is there.
    pub fn hold(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held = Self(open(path, flags, Mode::empty())?);
        if FileType::from_raw_mode(held.stat()?.st_mode) == FileType::Socket {
            Ok(held)
        } else {
            Err(io::Error::other("it is not a socket"))
        }
    }

    fn stat(&self) -> io::Result<Stat> {
        Ok(fstat(&self.0)?)
    }

    /// Who owns it.
    pub fn owner(&self) -> io::Result<u32> {
        Ok(self.stat()?.st_uid)
    }

    /// Who may do what with it: the access control list, or what the mode says.
    pub fn acl(&self) -> io::Result<Acl> {
        let mut buffer = acl::buffer();
        match getxattr(self.path(), acl::ATTRIBUTE, &mut buffer) {
            Ok(length) => buffer
                .get(..length)
                .and_then(Acl::decode)
                .ok_or_else(|| io::ErrorKind::InvalidData.into()),
            Err(Errno::NODATA | Errno::NOTSUP) => Ok(Acl::of_mode(self.stat()?.st_mode)),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives it this list. Only its owner and root may do that.
    pub fn set_acl(&self, acl: &Acl) -> io::Result<()> {
        let (path, bytes) = (self.path(), acl.encode());
        Ok(setxattr(path, acl::ATTRIBUTE, &bytes, XattrFlags::empty())?)
    }

    /// The attributes of what is not open are to be had by path only; this one leads to the held file.
    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt as _, chown};
    use std::os::unix::net::{UnixListener, UnixStream};

    use nix::unistd::{setfsgid, setfsuid};

    use super::*;

    #[test]
    fn a_held_socket_is_itself_wherever_it_is_moved() {
        let dir = tempfile::tempdir().unwrap();
        let [path, elsewhere] = ["s", "elsewhere"].map(|name| dir.path().join(name));
        let _listener = UnixListener::bind(&path).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        std::fs::set_permissions(&path, Permissions::from_mode(0o606)).unwrap();
        let file = SocketFile::hold(&path).unwrap();
        std::fs::rename(&path, &elsewhere).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        let other = (mode(&path), SocketFile::hold(&path).unwrap().acl().unwrap());
        let before = file.acl().unwrap();
        assert_eq!(before, Acl::of_mode(0o606));

        let mut acl = before.clone();
        assert!(acl.bar(65534));
        file.set_acl(&acl).unwrap();
        assert_eq!(SocketFile::hold(&elsewhere).unwrap().acl().unwrap(), acl);
        acl.unbar(65534);
        file.set_acl(&acl).unwrap();
        assert_eq!(file.acl().unwrap(), before);
        assert_eq!(mode(&elsewhere), 0o606);
        let now = (mode(&path), SocketFile::hold(&path).unwrap().acl().unwrap());
        assert_eq!(now, other);
    }

    #[test]
    fn the_kernel_lets_nobody_connect_who_is_barred() {
        if !nix::unistd::geteuid().is_root() {
            assert!(
                std::env::var_os("CI").is_none(),
                "to be other users takes root"
            );
            return;
        }
        let (barred, other) = (65_534, 65_533);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let file = SocketFile::hold(&path).unwrap();
        // A thread of its own: what it gives up, it does not get back.
        let connects = |user: u32| {
            let path = path.clone();
            let connect = move || {
                setfsgid(barred.into());
                setfsuid(user.into());
                UnixStream::connect(path)
                    .map(drop)
                    .map_err(|error| error.kind())
            };
            std::thread::spawn(connect).join().unwrap()
        };
        // Whoever connects is of the group `barred`.
        for (mode, group) in [
            (0o777, other),
            (0o606, other),
            (0o666, other),
            (0o660, barred),
        ] {
            chown(&path, None, Some(group)).unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let mut acl = file.acl().unwrap();
            assert!(acl.bar(barred));
            file.set_acl(&acl).unwrap();
            assert_eq!(
                connects(barred),
                Err(io::ErrorKind::PermissionDenied),
                "{mode:o}"
            );
            assert_eq!(connects(other), Ok(()), "{mode:o}");
            acl.unbar(barred);
            file.set_acl(&acl).unwrap();
            assert_eq!(connects(barred), Ok(()), "{mode:o}");
        }
    }

    #[test]
    fn nothing_but_a_socket_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let [file, link, socket] = ["file", "link", "socket"].map(|name| dir.path().join(name));
        let _listener = UnixListener::bind(&socket).unwrap();
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        for path in [&file, &link, &dir.path().join("nothing")] {
            assert!(SocketFile::hold(path).is_err(), "{}", path.display());
        }
    }
}
