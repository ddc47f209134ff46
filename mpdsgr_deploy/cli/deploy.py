"""mpdsgr deploy: one subcommand per serving engine"""

import shlex
from pathlib import Path
from typing import Any

import click

from mpdsgr_deploy.cli.output import json_option, print_json, signature_option, verdict_option
from mpdsgr_deploy.demand import demand_of
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.serving.deploy import kserve as kserve_files
from mpdsgr_deploy.serving.deploy import ray as ray_files
from mpdsgr_deploy.serving.deploy import triton as triton_files
from mpdsgr_deploy.serving.deploy.models import choose_models

FILE = click.Path(path_type=Path, dir_okay=False)
models_argument = click.argument("models", nargs=-1, required=True, metavar="[NAME=]BUNDLE[@PRECISION]...")
out_option = click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write.")


@click.group("deploy")
def command() -> None:
    """Write what other engines need to serve bundles.

    \b
    Example:
      mpdsgr deploy triton bundles/digits --out triton
      mpdsgr deploy kserve bundles/digits --out kserve --storage-uri s3://models/triton
      mpdsgr deploy ray bundles/digits --replicas 2 --out ray
    """


@command.command("triton")
@models_argument
@out_option
@click.option("--backend", default="onnxruntime", show_default=True, help="Triton's: onnxruntime or tensorrt.")
@click.option(
    "--gpus", type=click.IntRange(0, 64), help="How many each model runs on; 0: a CPU.  [tensorrt: 1, else 0]"
)
@signature_option
@verdict_option
@json_option
def triton(
    models: tuple[str, ...],
    out: Path,
    backend: str,
    gpus: int | None,
    signature: str | None,
    least_tier: str | None,
    as_json: bool,
) -> None:
    """Write a Triton model repository: called as `mpdsgr serve` calls its models.

    Triton checks no pixel values. An ONNX network is written with a check in it, and answers NaN to an image with NaN
    or values outside [0, 1], which mpdsgr serve refuses; an engine answers such an image as if it were valid.

    With --backend tensorrt they are the engines that `mpdsgr build`
    put into the bundles; those for GPUs of different compute capability go side by side. --out is fresh or holds what
    this command wrote before.

    \b
    Example:
      mpdsgr deploy triton bundles/digits bundles/digits@int8 --out triton
      mpdsgr deploy triton bundles/vgg11 --backend tensorrt --gpus 2 --out triton
    """
    count = gpus if gpus is not None else int(backend == "tensorrt")
    chosen = choose_models(models, demand_of(signature, least_tier))
    written = triton_files.write_repository(chosen, out, backend, count)
    device = "--gpus all -e NVIDIA_TF32_OVERRIDE=0 " if count else ""  # TF32 would flip spikes
    place = shlex.quote(str(out.resolve()))
    following = (
        f"docker run --rm {device}-p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 -v {place}:/models:ro "
        f"{triton_files.IMAGE} tritonserver --model-repository=/models"
    )
    if as_json:
        facts = [{**model._asdict(), "noise": [entry.model_dump() for entry in model.noise]} for model in written]
        print_json({"repository": str(out), "models": facts, "next": following})
        return
    if backend == "tensorrt":
        click.echo("warning: engines check no pixel values: 0..255 or NaN is answered as if it were an image", err=True)
    for model in written:
        engines = [f"TensorRT {version} for {capability}" for capability, version in model.engines.items()]
        click.echo(f"{model.name}: {model.precision}, {' and '.join(engines) or 'ONNX'}, batches to {model.largest}")
        for entry in model.noise:
            drawn = "U[0, 1)" if entry.kind == "uniform" else "N(0, 1)"
            click.echo(f"  clients must also send {entry.name} FP32 [B, {', '.join(map(str, entry.shape))}] of {drawn}")
    click.echo(f"model repository in {out}; next: {following}")


@command.command("kserve")
@models_argument
@out_option
@click.option("--storage-uri", required=True, metavar="URI", help="Where the cluster finds what is served (see above).")
@click.option(
    "--runtime", default="triton", show_default=True, help=f"What serves: {', '.join(kserve_files.RUNTIMES)}."
)
@click.option("--image", help="Its container image.  [triton: NVIDIA's; mpdsgr: yours, from serve/docker]")
@click.option("--gpus", type=click.IntRange(0, 64), default=0, show_default=True, help="Of each replica; 0: a CPU.")
@click.option("--cpus", type=click.IntRange(1, 256), default=2, show_default=True, help="Cores of each replica.")
@click.option("--memory", default="2Gi", show_default=True, help="Of each replica.")
@click.option("--replicas", default="1", show_default=True, metavar="N|MIN,MAX", help="Fixed, or scaled by load.")
@click.option("--service-account", help="That reads the storage: it names the credentials.")
@signature_option
@verdict_option
@json_option
def kserve(
    as_json: bool,
    signature: str | None,
    least_tier: str | None,
    models: tuple[str, ...],
    out: Path,
    storage_uri: str,
    runtime: str,
    replicas: str,
    **replica: Any,
) -> None:
    """Write KServe resources: one InferenceService a model, and the ServingRuntime they use.

    With --runtime triton, URI is where you put what `mpdsgr deploy triton` wrote of the same bundles, with the same
    --gpus; with --runtime mpdsgr it is where the bundles themselves lie, each under its directory's name. It is a place
    that KServe reads, such as s3://BUCKET/PATH, gs://BUCKET/PATH or pvc://CLAIM/PATH. Several models on Triton need
    KServe 0.17 and s3 or gs; everything else works from 0.16 on. A file in --out that you edited stays, and the
    difference is shown.

    \b
    Example:
      mpdsgr deploy kserve bundles/digits bundles/digits@int8 --out kserve --storage-uri s3://models/triton
      mpdsgr deploy kserve bundles/digits --runtime mpdsgr --image mpdsgr-serve:cpu --out kserve \\
        --storage-uri pvc://bundles/robust --replicas 2,8
    """
    demand = demand_of(signature, least_tier)
    chosen = kserve_files.ReplicaSpec(replicas=_span(replicas), demand=demand, **replica)
    written = kserve_files.write_resources(choose_models(models, demand), out, storage_uri, runtime, chosen)
    if as_json:
        print_json({"directory": str(out), "files": written, "next": f"kubectl apply -f {out}"})
        return
    for name in written:
        click.echo(out / name)
    click.echo(f"resources in {out}; next: kubectl apply -f {shlex.quote(str(out))}")


@command.command("ray")
@models_argument
@out_option
@click.option("--replicas", default="1", show_default=True, metavar="N|MIN,MAX", help="Fixed, or scaled by load.")
@click.option("--gpu", type=click.FloatRange(0), default=0.0, show_default=True, help="Share each replica takes.")
@click.option("--backend", help="What runs the networks.  [onnxruntime-cuda with --gpu, else onnxruntime-cpu]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address every node listens on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Of HTTP.")
@click.option("--settings", type=FILE, help="TOML file with limits, as of mpdsgr serve.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: limits.batch=128.")
@click.option("--api-key-file", type=FILE, help="Keys that clients must send, one per line; on every node.")
@click.option("--insecure", is_flag=True, help="Listen where others reach it, without keys.")
@signature_option
@verdict_option
@json_option
def ray(
    models: tuple[str, ...],
    out: Path,
    replicas: str,
    gpu: float,
    backend: str | None,
    host: str,
    port: int,
    settings: Path | None,
    overrides: tuple[str, ...],
    api_key_file: Path | None,
    insecure: bool,
    signature: str | None,
    least_tier: str | None,
    as_json: bool,
) -> None:
    """Write a Ray Serve config: one application, whose replicas each serve all these models as mpdsgr serve does.

    HTTP only: no gRPC. Bundles and key file must lie at the same paths on every node, where mpdsgr-deploy[ray,cpu] (or
    gpu) is installed. Several nodes need --host 0.0.0.0. Protect Ray's own ports: whoever reaches them can run code.

    \b
    Example:
      mpdsgr deploy ray bundles/digits --replicas 2,8 --host 0.0.0.0 --api-key-file keys.txt --out ray
      mpdsgr deploy ray bundles/vgg11@fp16 --gpu 0.5 --replicas 2 --out ray
    """
    from mpdsgr_deploy.serving.settings import load_settings

    place = ray_files.Place(_span(replicas), gpu, host, port)
    demanded = load_settings(settings, overrides).demanding(signature, least_tier)
    config = ray_files.write_config(
        choose_models(models, demanded.trust.demand()),
        out,
        place,
        demanded.everywhere(),
        backend,
        api_key_file,
        insecure=insecure,
    )
    following = f"serve deploy {config}"
    if as_json:
        print_json({"config": str(config), "next": following})
        return
    click.echo(f"Ray Serve config in {config}; next, on a node of a running Ray cluster: {following}")


def _span(replicas: str) -> tuple[int, int]:
    """Parse N or MIN,MAX as the smallest and the largest number. Raises InputError for anything else."""
    least, comma, most = replicas.partition(",")
    if not least.isdecimal() or (comma and not most.isdecimal()):
        raise InputError(f"--replicas {replicas}: write a number, or the least and the most, for example 1,4")
    return int(least), int(most or least)
