"""Folders of output files as comparable facts; what was shown once is named by its number after that.

usage: outputs.py DIR...
"""
import os
import re
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).parent.parent / "real"))
from describe import describe  # noqa: E402


def compact(text):
    """Certificates and other long parts are shown in full once."""
    shown, lines = {}, []
    text = re.sub(r"LS0tLS1[A-Za-z0-9+/=]+", "<base64>", text)
    text = re.sub(r"eyJ[\w-]+\.[\w-]+\.[\w-]+", "<jwt>", text)
    for part in re.split(r"(?m)^(?=\[|FILE:|====|####|@|apiVersion)", text):
        if part.count("\n") < 4:
            lines.append(part)
        elif part in shown:
            lines.append(f"<as {shown[part]}>\n")
        else:
            shown[part] = len(shown) + 1
            lines.append(f"<{shown[part]}>\n{part}")
    return "".join(lines)


if __name__ == "__main__":
    folders = [f"#### {os.path.basename(folder)}\n{describe(folder)}" for folder in sys.argv[1:]]
    sys.stdout.write(compact("".join(folders)))
