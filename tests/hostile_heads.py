"""What comes over HTTP and is no request, or none that is answered: bytes, status, and a part of the message."""

from hostile_requests import GOOD
from served import INFER, http


def head(line: str, *headers: str) -> bytes:
    return "\r\n".join((line, "Host: localhost", *headers, "", "")).encode("latin-1")


POST = f"POST {INFER} HTTP/1.1"
HTTP = "this is not an HTTP/1.1 request"
HEAD = "head of a request may have at most 65536 bytes"
WIRE: dict[str, tuple[bytes, int, str]] = {
    "garbage": (bytes(range(256)), 400, HTTP),
    "zeros": (bytes(1000), 400, HTTP),
    "TLS": (bytes.fromhex("16030100f8010000f40303") + bytes(240), 400, HTTP),
    "HTTP/0.9": (b"GET /v2\r\n\r\n", 400, HTTP),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, HTTP),
    "GET of HTTP/2.0": (head("GET /v2 HTTP/2.0"), 400, HTTP),
    "HTTP/3.7": (head("GET /v2 HTTP/3.7"), 400, HTTP),
    "no version": (head("GET /v2 HTTP/"), 400, HTTP),
    "a method of its own": (head("BREW /v2 HTTP/1.1"), 400, HTTP),
    "no path": (head("GET http://test HTTP/1.1"), 400, HTTP),
    "CONNECT": (head("CONNECT test:443 HTTP/1.1"), 400, HTTP),
    "path not in ASCII": (head("GET /v2/\xff\xfe HTTP/1.1"), 400, HTTP),
    "NUL in a header": (head("GET /v2 HTTP/1.1", "A: a\0b"), 400, HTTP),
    "CR in a header": (head("GET /v2 HTTP/1.1", "A: a\rB: b"), 400, HTTP),
    "LF in a request id": (head("GET /v2 HTTP/1.1", "X-Request-Id: a\n\nSet-Cookie: b"), 400, HTTP),
    "a folded header": (head("GET /v2 HTTP/1.1", "A: a", " b"), 400, HTTP),
    "space before the colon": (head("GET /v2 HTTP/1.1", "A : a"), 400, HTTP),
    "no colon": (head("GET /v2 HTTP/1.1", "A"), 400, HTTP),
    "Content-Length -3": (head(POST, "Content-Length: -3") + b"abc", 400, HTTP),
    "Content-Length +3": (head(POST, "Content-Length: +3") + b"abc", 400, HTTP),
    "Content-Length 1_0": (head(POST, "Content-Length: 1_0") + b"0123456789", 400, HTTP),
    "Content-Length 0x3": (head(POST, "Content-Length: 0x3") + b"abc", 400, HTTP),
    "Content-Length of 30 digits": (head(POST, "Content-Length: " + "9" * 30) + b"abc", 400, HTTP),
    "Content-Length empty": (head(POST, "Content-Length:") + b"abc", 400, HTTP),
    "two Content-Lengths": (head(POST, "Content-Length: 3", "Content-Length: 4") + b"abcd", 400, HTTP),
    "Content-Length and chunks": (
        head(POST, "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        400,
        HTTP,
    ),
    "Transfer-Encoding identity": (head(POST, "Transfer-Encoding: identity") + b"abc", 400, HTTP),
    "chunked, then gzip": (head(POST, "Transfer-Encoding: chunked, gzip") + b"0\r\n\r\n", 400, HTTP),
    "a chunk's length in words": (head(POST, "Transfer-Encoding: chunked") + b"zz\r\nabc\r\n", 400, HTTP),
    "a chunk of -1": (head(POST, "Transfer-Encoding: chunked") + b"-1\r\nabc\r\n", 400, HTTP),
    "a chunk of 2^64": (head(POST, "Transfer-Encoding: chunked") + b"10000000000000000\r\nabc", 400, HTTP),
    "a chunk longer than it says": (head(POST, "Transfer-Encoding: chunked") + b"3\r\nabcdef\r\n", 400, HTTP),
    "a long header": (head("GET /v2 HTTP/1.1", "A: " + "a" * 70_000), 431, HEAD),
    "a longer one": (head("GET /v2 HTTP/1.1", "A: " + "a" * 2_000_000), 431, HEAD),
    "a long path": (head("GET /v2" + "a" * 70_000 + " HTTP/1.1"), 431, HEAD),
    "many headers": (head("GET /v2 HTTP/1.1", *["abcd: 5678"] * 9000), 431, HEAD),
    "trailers without end": (
        head(POST, "Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\n" + b"a: b\r\n" * 100_000,
        431,
        HEAD,
    ),
    "a trailer without end": (
        head(POST, "Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\na:" + b"b" * 500_000,
        431,
        HEAD,
    ),
    "a chunk's extension without end": (
        head(POST, "Transfer-Encoding: chunked") + b"1;" + b"b" * 500_000,
        431,
        HEAD,
    ),
    "GET of inference": (http("GET", INFER), 405, "does not accept GET; use POST"),
    "PUT of inference": (http("PUT", INFER, GOOD), 405, "does not accept PUT; use POST"),
    "DELETE of a model": (http("DELETE", "/v2/models/bundle"), 405, "does not accept DELETE; use GET"),
    "POST of metadata": (http("POST", "/v2", b"{}"), 405, "does not accept POST; use GET"),
    "POST of readiness": (http("POST", "/v2/health/ready", b"{}"), 405, "does not accept POST; use GET"),
    "POST of metrics": (http("POST", "/metrics", b"{}"), 405, "does not accept POST; use GET"),
    "GET of the index": (http("GET", "/v2/repository/index"), 405, "does not accept GET; use POST"),
    "TRACE": (http("TRACE", "/v2"), 405, "does not accept TRACE; use GET"),
    "OPTIONS": (http("OPTIONS", "*"), 404, "there is no *"),
    "index of no JSON": (http("POST", "/v2/repository/index", b"{"), 400, "not JSON"),
    "loading": (http("POST", "/v2/repository/models/bundle/load", b"{}"), 403, "--repository-control"),
    "unloading": (http("POST", "/v2/repository/models/bundle/unload", b"{}"), 403, "--repository-control"),
    "other doings": (http("POST", "/v2/repository/models/bundle/reload", b"{}"), 404, "there is no"),
    **{
        f"no {path}": (http("GET", path), 404, "")
        for path in (
            "/nope",
            "/v1/models/bundle",
            "/v2/models",
            "/v2/models/nope",
            "/v2/models/bundle%00",
            "/v2/models/bundle%2finfer%00",
            "/v2/models/%2562undle",
            "/v2/models/%2e%2e/%2e%2e/etc/passwd",
            "/v2/models/..%2f..%2fetc%2fpasswd",
            "/v2/models/../../etc/passwd",
            "/v2/models/bundle/../bundle",
            "/v2/models/bundle%0d%0aSet-Cookie:a",
            "/v2/models/%ed%a0%80",
            "/v2/models/" + "x" * 10_000,
            "/v2/models//bundle",
            "/v2//models/bundle",
            "//v2/models/bundle",
            "/v2/models/bundle/versions",
            "/v2/models/bundle/versions/2",
            "/v2/models/bundle/versions/01",
            "/v2/models/bundle/versions/-1",
            "/v2/models/bundle/versions/%00",
            "/v2/models/bundle/versions/1/versions/1",
            "/v2/models/bundle/versions/" + "9" * 5000,
            "/v2/models/bundle/nope",
            "/v2/systemsharedmemory/status",
            "/metrics/../v2/models/nope",
        )
    },
}
