"""The page at `/`: a static file, and a Content-Security-Policy that allows only its own script and style."""

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib import resources


@cache
def page() -> tuple[bytes, bytes]:
    """Return the page, in UTF-8, and the value of its header `Content-Security-Policy`."""
    content = resources.files("mpdsgr_deploy.serving").joinpath("page.html").read_bytes()
    script, style = (_digest(content, tag) for tag in (b"script", b"style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return content, policy.encode()


def _digest(content: bytes, tag: bytes) -> str:
    """Return the source expression that allows the page's only element with this tag."""
    (inside,) = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
    return f"'sha256-{b64encode(sha256(inside).digest()).decode()}'"
