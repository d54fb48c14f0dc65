"""Folders of identity files as comparable facts: what differs at each run (keys, serials, dates) becomes its kind."""
import os
import re
import subprocess
import tempfile
from datetime import datetime

PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----\n?", re.S)
VARIES = (
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<uuid>"),
    (r"20\d\d-\d\d-\d\dT[0-9:.]+Z", "<time>"),
    (r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", "<hash>"),
    (r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp256) [A-Za-z0-9+/=]{40,}", r"\1 <key>"),
    (r"serialNumber=\d+", "serialNumber=<serial>"),
)


def describe(directory):
    """One text for a folder: each file's name, mode and content, in the order of the names."""
    lines = []
    for folder, folders, files in sorted(os.walk(directory)):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(folder, name)
            with open(path, errors="replace") as file:
                text = file.read().replace(str(directory), "DIR")
            if name.startswith("."):
                continue
            lines.append(f"==== {os.path.relpath(path, directory)} {os.stat(path).st_mode & 0o7777:o}\n")
            lines.append(content(text))
    return "".join(lines)


def content(text):
    parts, at = [], 0
    for block in PEM.finditer(text):
        parts.append(plain(text[at:block.start()]))
        parts.append(pem(block[1], block[0]))
        at = block.end()
    return "".join(parts) + plain(text[at:])


def pem(kind, block):
    if kind == "CERTIFICATE":
        return certificate(block)
    return f"[{kind}]\n"


def plain(text):
    lines = []
    for line in text.splitlines(keepends=True):
        if "-cert-v01@openssh.com " in line and not line.startswith("@"):
            line = ssh_certificate(line)
        for pattern, kind in VARIES:
            line = re.sub(pattern, kind, line)
        lines.append(line)
    return "".join(lines)


def tool(*command, data=None):
    return subprocess.run(command, input=data, capture_output=True, text=True).stdout


def certificate(block):
    text = tool("openssl", "x509", "-noout", "-text", "-nameopt", "RFC2253,sep_multiline,-esc_msb,-dump_unknown",
                data=block)
    dates = [datetime.strptime(found.strip(), "%b %d %H:%M:%S %Y GMT")
             for found in re.findall(r"Not (?:Before|After) ?: (.*)", text)]
    minutes = round((dates[1] - dates[0]).total_seconds() / 60)
    text = re.sub(r"Validity\n.*\n.*\n", f"Validity: {minutes} minutes\n", text)
    text = re.sub(r"Serial Number:.*\n(\s+[0-9a-f:]+\n)?", "Serial Number: <n>\n", text)
    text = re.sub(r"(?m)^\s+([0-9a-fA-F]{2}:)+[0-9a-fA-F]{0,2}\n", "", text)
    text = re.sub(r"([0-9A-F]{2}:){19}[0-9A-F]{2}", "<id>", text)
    for pattern, kind in VARIES:
        text = re.sub(pattern, kind, text)
    return f"[CERTIFICATE]\n{text}"


def ssh_certificate(line):
    with tempfile.NamedTemporaryFile("w", suffix=".pub") as file:
        file.write(line)
        file.flush()
        text = tool("ssh-keygen", "-L", "-f", file.name).replace(file.name, "FILE")
    dates = re.search(r"Valid: from (\S+) to (\S+)", text)
    if dates:
        begin, end = (datetime.fromisoformat(date) for date in dates.groups())
        text = text.replace(dates[0], f"Valid: {round((end - begin).total_seconds() / 60)} minutes")
    text = re.sub(r"SHA256:\S+", "<hash>", text)
    text = re.sub(r"Serial: .*", "Serial: <n>", text)
    value = lambda found: "= " + bytes.fromhex(found[1]).decode(errors="replace")
    return re.sub(r"UNKNOWN OPTION: [0-9a-f]{8}([0-9a-f]*) \(len \d+\)", value, text)
