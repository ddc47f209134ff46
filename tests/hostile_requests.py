"""Inference requests over HTTP that must be refused: bytes, status, and a part of the message."""

import gzip
import json
import zlib
from typing import Any

import numpy as np
from served import INFER, http, images, request

HEADER = "Inference-Header-Content-Length"
MOST = 32  # images a request
BODY = (1 << 16) + MOST * 64 * 32  # bytes that a server with this limit takes for one
X = images()
GOOD = request(X)
TENSOR = GOOD["inputs"][0]
DATA = TENSOR["data"]
MiB = 1 << 20


def post(body: Any, **headers: object) -> bytes:
    """An inference request with this body; headers with _ for -."""
    content = body if isinstance(body, bytes | dict) else json.dumps(body).encode()
    return http("POST", INFER, content, {name.replace("_", "-"): value for name, value in headers.items()})


def asked(**entries: Any) -> bytes:
    """The good request with these entries in place of, or beside, its own."""
    return post({**GOOD, **entries})


def tensor(*without: str, **entries: Any) -> bytes:
    """The good request whose tensor has these entries and lacks those."""
    changed = {key: value for key, value in {**TENSOR, **entries}.items() if key not in without}
    return asked(inputs=[changed])


def data(*numbers: str, count: int = 64, datatype: str = "FP32") -> bytes:
    """The good request with numbers as JSON text, the last of them as often as it takes."""
    text = ",".join([*numbers, *[numbers[-1]] * (count - len(numbers))])
    body = {"inputs": [{**TENSOR, "datatype": datatype, "data": "HERE"}]}
    return post(json.dumps(body).replace('"HERE"', f"[{text}]").encode())


def output(name: Any = "logits", **parameters: Any) -> bytes:
    return asked(outputs=[{"name": name, "parameters": parameters}])


def parameters(**entries: Any) -> bytes:
    return asked(parameters=entries)


def binary(
    content: bytes = X.tobytes(), size: Any = ..., length: Any = ..., rest: bytes = b"", **entries: Any
) -> bytes:
    """With the binary extension; size and length: what is claimed in place of the truth."""
    told = {"binary_data_size": len(content) if size is ... else size}
    changed = {key: value for key, value in TENSOR.items() if key != "data"} | {"parameters": told} | entries
    head = json.dumps({"inputs": [changed]}).encode()
    return http("POST", INFER, head + content + rest, {HEADER: len(head) if length is ... else length})


def pixel(value: float) -> bytes:
    x = X.copy()
    x[0, 0, 3, 3] = value
    return binary(x.tobytes())


def chunked(*parts: bytes, **headers: object) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    return post(body, Transfer_Encoding="chunked", **headers)


TEXT = json.dumps(GOOD).encode()
PACKED = gzip.compress(TEXT)
NESTED = X.tolist()
NO_JSON = "not JSON"
SHAPE = "must have shape [B, 1, 8, 8], not "
RANGE = "in [0, 1]"
FIT = "does not fit"
LISTS = "not nested as the shape"

CONTENT: dict[str, tuple[bytes, int, str]] = {
    "nothing": (post(b""), 400, NO_JSON),
    "half": (post(TEXT[:-1]), 400, NO_JSON),
    "more behind": (post(TEXT + b"{}"), 400, NO_JSON),
    "single quotes": (post(b"{'inputs': []}"), 400, NO_JSON),
    "a comma too many": (post(b'{"inputs": [],}'), 400, NO_JSON),
    "60,000 lists deep": (post(b"[" * 60_000), 400, NO_JSON),
    "100,000 lists deep": (post(b"[" * 100_000), 400, "more values than 32 images"),
    "deep in the data": (post(b'{"inputs":[{"data":' + b"[" * 60_000), 400, NO_JSON),
    "deep objects": (post(b'{"a":' * 20_000), 400, NO_JSON),
    "UTF-16": (post(TEXT.decode().encode("utf-16")), 400, NO_JSON),
    "no UTF-8": (post(b'{"id": "\xff\xfe"}'), 400, NO_JSON),
    "surrogates in UTF-8": (post(b'{"id": "\xed\xa0\x80"}'), 400, NO_JSON),
    "byte order mark": (post(b"\xef\xbb\xbf" + TEXT), 400, NO_JSON),
    "NUL": (post(TEXT + b"\0"), 400, NO_JSON),
    "a list": (post([GOOD]), 400, "must be a JSON object"),
    "null": (post(None), 400, "must be a JSON object"),
    "a number": (post(5), 400, "must be a JSON object"),
    "an empty object": (post({}), 400, "inputs must be a list"),
    "inputs null": (asked(inputs=None), 400, "inputs must be a list"),
    "inputs an object": (asked(inputs=TENSOR), 400, "inputs must be a list"),
    "no input": (asked(inputs=[]), 400, "this one has 0"),
    "input twice": (asked(inputs=[TENSOR, TENSOR]), 400, "this one has 2"),
    "input a list": (asked(inputs=[[]]), 400, "must be a JSON object"),
    "input unknown": (tensor(name="image"), 400, "there is no input 'image'"),
    "input nameless": (tensor("name"), 400, "needs a name"),
    "input named by a number": (tensor(name=1), 400, "needs a name"),
    "input with a surrogate": (tensor(name="\ud800"), 400, NO_JSON),
    "no datatype": (tensor("datatype"), 400, "needs a name and a datatype"),
    "FP64": (tensor(datatype="FP64"), 400, "not 'FP64'"),
    "fp32": (tensor(datatype="fp32"), 400, "not 'fp32'"),
    "BYTES": (tensor(datatype="BYTES"), 400, "not 'BYTES'"),
    "datatype null": (tensor(datatype=None), 400, "needs a name and a datatype"),
    "no shape": (tensor("shape"), 400, "whole numbers"),
    "shape in words": (tensor(shape="1,1,8,8"), 400, "whole numbers"),
    "shape of floats": (tensor(shape=[1.0, 1, 8, 8]), 400, "whole numbers"),
    "shape of booleans": (tensor(shape=[True, True, 8, 8]), 400, "whole numbers"),
    "shape null": (tensor(shape=[None, 1, 8, 8]), 400, "whole numbers"),
    "shape -1": (tensor(shape=[-1, 1, 8, 8]), 400, "whole numbers"),
    "shapes -1 that multiply": (tensor(shape=[-1, -1, 8, 8]), 400, "whole numbers"),
    "shape 2^63": (tensor(shape=[2**63, 1, 8, 8]), 400, "whole numbers"),
    "shape 10^400": (tensor(shape=[10**400, 1, 8, 8]), 400, NO_JSON),
    "10^12 images": (tensor(shape=[10**12, 1, 8, 8]), 400, f"may hold at most {MOST} images"),
    "2^62 rows": (tensor(shape=[4, 1, 2**62, 8]), 400, SHAPE),
    "rank 0": (tensor(shape=[]), 400, SHAPE + "[]"),
    "rank 3": (tensor(shape=[1, 8, 8]), 400, SHAPE),
    "rank 10,000": (tensor(shape=[1] * 10_000), 400, SHAPE),
    "another size": (tensor(shape=[1, 1, 4, 16]), 400, SHAPE),
    "no image": (tensor(shape=[0, 1, 8, 8], data=[]), 400, SHAPE),
    "one image too many": (
        tensor(shape=[MOST + 1, 1, 8, 8], data=[0] * (MOST + 1) * 64),
        400,
        f"may hold at most {MOST} images, and this one holds {MOST + 1}",
    ),
    "no data": (tensor("data"), 400, "data must be a list"),
    "data null": (tensor(data=None), 400, "data must be a list"),
    "data in words": (tensor(data="0" * 64), 400, "data must be a list"),
    "data a number": (tensor(data=0.5), 400, "data must be a list"),
    "data empty": (tensor(data=[]), 400, "takes 64 numbers, got 0"),
    "one number less": (tensor(data=DATA[1:]), 400, "takes 64 numbers, got 63"),
    "one number more": (tensor(data=[*DATA, 0]), 400, "takes 64 numbers, got 65"),
    "a boolean": (tensor(data=[True, *DATA[1:]]), 400, "must contain only numbers"),
    "a text": (tensor(data=["0.5", *DATA[1:]]), 400, "must contain only numbers"),
    "a null": (tensor(data=[None, *DATA[1:]]), 400, "must contain only numbers"),
    "an object": (tensor(data=[{}, *DATA[1:]]), 400, "must contain only numbers"),
    "a list among numbers": (tensor(data=[*DATA[1:], [0]]), 400, "must contain only numbers"),
    "numbers among lists": (tensor(data=[[0], *DATA[1:]]), 400, LISTS),
    "ragged": (tensor(data=[[[*NESTED[0][0][:7], NESTED[0][0][7][:7]]]]), 400, LISTS),
    "nested too little": (tensor(data=NESTED[0][0]), 400, LISTS),
    "nested too much": (tensor(data=[[[[[n] for n in row] for row in NESTED[0][0]]]]), 400, LISTS),
    "empty lists": (tensor(data=[[[[]] * 8]]), 400, LISTS),
    "NaN": (data("NaN"), 400, NO_JSON),
    "Infinity": (data("0", "Infinity", "0"), 400, NO_JSON),
    "-Infinity": (data("0", "-Infinity", "0"), 400, NO_JSON),
    "1e400": (data("0", "1e400", "0"), 400, NO_JSON),
    "1e39, infinite in FP32": (data("0", "1e39", "0"), 400, RANGE),
    "10^400": (data("0", "1" + "0" * 400, "0"), 400, NO_JSON),
    "a number of 10,000 digits": (data("0", "1" * 10_000, "0"), 400, NO_JSON),
    "1.0001": (data("0", "1.0001", "0"), 400, RANGE),
    "-0.0001": (data("0", "-0.0001", "0"), 400, RANGE),
    "UINT8 256": (data("0", "256", "0", datatype="UINT8"), 400, "outside the range of UINT8"),
    "UINT8 -1": (data("0", "-1", "0", datatype="UINT8"), 400, "outside the range of UINT8"),
    "UINT8 0.5": (data("0", "0.5", "0", datatype="UINT8"), 400, "whole numbers"),
    "outputs an object": (asked(outputs={}), 400, "outputs must be a list"),
    "output unknown": (output("probabilities"), 400, "there is no output 'probabilities'"),
    "output nameless": (asked(outputs=[{}]), 400, "needs a name"),
    "output null": (asked(outputs=[None]), 400, "must be a JSON object"),
    "output twice": (asked(outputs=[{"name": "logits"}] * 2), 400, "requested twice"),
    "binary_data in words": (output(binary_data="true"), 400, "true or false"),
    "binary_data 1": (output(binary_data=1), 400, "true or false"),
    "classes in words": (output(classification="3"), 400, "classification must be"),
    "classes true": (output(classification=True), 400, "classification must be"),
    "classes -1": (output(classification=-1), 400, "classification must be"),
    "classes 1.5": (output(classification=1.5), 400, "classification must be"),
    "classes 10^30": (output(classification=10**30), 400, "classification must be"),
    "classes of the margin": (output("margin", classification=2), 400, "classification is only available for"),
    "parameters a list": (asked(parameters=[]), 400, "parameters must be a JSON object"),
    "timeout in words": (parameters(timeout="5"), 400, "timeout must be"),
    "timeout false": (parameters(timeout=False), 400, "timeout must be"),
    "timeout 0.5": (parameters(timeout=0.5), 400, "timeout must be"),
    "timeout -1": (parameters(timeout=-1), 400, "timeout must be"),
    "timeout 2^63": (parameters(timeout=2**63), 400, "timeout must be"),
    "timeout a list": (parameters(timeout=[]), 400, "timeout must be"),
    "id a number": (asked(id=5), 400, "id must be"),
    "id too long": (asked(id="x" * 257), 400, "id must be"),
    "id half a character": (asked(id="\ud800"), 400, NO_JSON),
    "input in shared memory": (
        tensor(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 256}),
        400,
        "shared memory",
    ),
    "output in shared memory": (output(shared_memory_region="r", shared_memory_byte_size=40), 400, "shared memory"),
    # the binary extension
    "binary NaN": (pixel(np.nan), 400, RANGE),
    "binary infinite": (pixel(np.inf), 400, RANGE),
    "binary 1.0001": (pixel(1.0001), 400, RANGE),
    "binary below 0": (pixel(-1e-30), 400, RANGE),
    "binary and data": (binary(data=DATA), 400, "has data both"),
    "a byte less": (binary(X.tobytes()[:-1]), 400, "takes 256 bytes, got 255"),
    "a byte more": (binary(X.tobytes() + b"\0"), 400, "takes 256 bytes, got 257"),
    "UINT8 of float's size": (binary(datatype="UINT8"), 400, "takes 64 bytes, got 256"),
    "size too small": (binary(size=255), 400, "there are 1 bytes after"),
    "size too big": (binary(size=257), 400, FIT),
    "size negative": (binary(size=-1), 400, FIT),
    "size 10^30": (binary(size=10**30), 400, FIT),
    "size true": (binary(size=True), 400, FIT),
    "size in words": (binary(size="256"), 400, FIT),
    "size 256.0": (binary(size=256.0), 400, FIT),
    "size null": (binary(size=None), 400, "data must be a list"),
    "bytes left": (binary(rest=b"xyz"), 400, "there are 3 bytes after"),
    "binary, 10^12 images": (binary(shape=[10**12, 1, 8, 8]), 400, f"may hold at most {MOST} images"),
    "length beyond the body": (binary(length=10_000), 400, FIT),
    "length cuts the JSON": (binary(length=20), 400, NO_JSON),
    "length 0": (binary(length=0), 400, NO_JSON),
    "length negative": (binary(length=-1), 400, FIT),
    "length +5": (binary(length="+5"), 400, FIT),
    "length 1_0": (binary(length="1_0"), 400, FIT),
    "length in Arabic digits": (binary(length="\u0661\u0660".encode().decode("latin-1")), 400, FIT),
    "length superscript": (binary(length="\xb2"), 400, FIT),
    "length empty": (binary(length=""), 400, FIT),
    "length of 5,000 digits": (binary(length="1" * 5000), 400, FIT),
    "no length": (post(TEXT + X.tobytes()), 400, NO_JSON),
    # how the body is sent
    "body over the limit": (post(b" " * (BODY + 1)), 413, f"may have at most {BODY} bytes"),
    "claimed 10^12 bytes": (post(b"", Content_Length=10**12), 413, f"may have at most {BODY} bytes"),
    "chunks over the limit": (chunked(*[b" " * 4096] * 40), 413, f"may have at most {BODY} bytes"),
    "br": (post(TEXT, Content_Encoding="br"), 415, "'br' is not supported"),
    "gzip twice": (post(gzip.compress(PACKED), Content_Encoding="gzip, gzip"), 415, "is not supported"),
    "not gzip": (post(TEXT, Content_Encoding="gzip"), 400, "not compressed as its header states"),
    "gzip cut": (post(PACKED[:-9], Content_Encoding="gzip"), 400, "ends too early"),
    "gzip without its end": (post(PACKED[:-1], Content_Encoding="gzip"), 400, "ends too early"),
    "gzip of nothing": (post(b"", Content_Encoding="gzip"), 400, "ends too early"),
    "gzip corrupt": (post(PACKED[:40] + b"\xff" * 9 + PACKED[49:], Content_Encoding="gzip"), 400, "not compressed"),
    "gzip's checksum": (post(PACKED[:-8] + b"\0" * 8, Content_Encoding="gzip"), 400, "not compressed"),
    "gzip with a tail": (post(PACKED + b"tail", Content_Encoding="gzip"), 400, "after the end"),
    "two gzip members": (post(PACKED * 2, Content_Encoding="gzip"), 400, "after the end"),
    "gzip bomb": (post(gzip.compress(bytes(4 * MiB)), Content_Encoding="gzip"), 413, f"may have at most {BODY} bytes"),
    "deflate bomb": (post(zlib.compress(bytes(4 * MiB)), Content_Encoding="deflate"), 413, "may have"),
    "gzip of no bytes for ever": (
        chunked(PACKED[:10], *[b"\0\0\0\xff\xff" * 2000] * 14, Content_Encoding="gzip"),
        413,
        "may have",
    ),
}
