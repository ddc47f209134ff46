"""mpdsgr deploy: one subcommand per serving engine"""

import shlex
from pathlib import Path
from typing import Any

import click

from mpdsgr_deploy.cli.number_list import number_list
from mpdsgr_deploy.cli.output import json_option, overrides_option, print_json, signature_option, verdict_option
from mpdsgr_deploy.demand import demand_of
from mpdsgr_deploy.serving.deploy import kserve as kserve_files
from mpdsgr_deploy.serving.deploy import ray as ray_files
from mpdsgr_deploy.serving.deploy import triton as triton_files
from mpdsgr_deploy.serving.source import choose_models

FILE = click.Path(path_type=Path, dir_okay=False)
models_argument = click.argument("models", nargs=-1, required=True, metavar="[NAME=]BUNDLE[@PRECISION]...")
replicas_option = click.option(
    "--replicas",
    default="1",
    show_default=True,
    metavar="N|MIN,MAX",
    help="Number of replicas, or the smallest and the largest number, between which the load decides.",
)
out_option = click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory for the files.")


@click.group("deploy")
def command() -> None:
    """Write the files that Triton, KServe or Ray Serve need for bundles.

    \b
    Example:
      mpdsgr deploy triton bundles/digits --out triton
      mpdsgr deploy kserve bundles/digits --out kserve --storage-uri s3://models/triton
      mpdsgr deploy ray bundles/digits --replicas 2 --out ray
    """


@command.command("triton")
@models_argument
@out_option
@click.option("--backend", default="onnxruntime", show_default=True, help="Triton backend: onnxruntime or tensorrt.")
@click.option(
    "--gpus",
    type=click.IntRange(0, 64),
    help="Number of GPUs that each model runs on; 0 runs it on a CPU.  [default: 1 for tensorrt, else 0]",
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
    """Write a model repository for Triton.

    Models are named as by `mpdsgr serve`. Unlike `mpdsgr serve`, Triton does not refuse images with NaN or with values
    outside [0, 1]. The ONNX networks in the repository therefore contain a check, and answer NaN to such an image.
    TensorRT engines contain no check and answer it as if it were valid.

    With --backend tensorrt the repository contains the engines that `mpdsgr build` has added to the bundles. It can
    contain engines for several compute capabilities at once. --out must be a new directory or one that this command
    has written.

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
        click.echo(
            "warning: TensorRT engines do not check pixel values: they answer NaN and values outside [0, 1] as if they "
            "were valid, so check images before you send them",
            err=True,
        )
    for model in written:
        engines = [f"TensorRT {version} for {capability}" for capability, version in model.engines.items()]
        click.echo(f"{model.name}: {model.precision}, {' and '.join(engines) or 'ONNX'}, batches up to {model.largest}")
        for entry in model.noise:
            drawn = "U[0, 1)" if entry.kind == "uniform" else "N(0, 1)"
            shape = ", ".join(map(str, entry.shape))
            click.echo(f"  clients must also send the tensor {entry.name}, FP32 [B, {shape}], drawn from {drawn}")
    click.echo(f"model repository in {out}; next: {following}")


@command.command("kserve")
@models_argument
@out_option
@click.option(
    "--storage-uri",
    required=True,
    metavar="URI",
    help="Address from which the cluster loads the models, as described above.",
)
@click.option("--runtime", default="triton", show_default=True, help=f"Server: {', '.join(kserve_files.RUNTIMES)}.")
@click.option(
    "--image",
    help="Container image of the server. mpdsgr needs one that you built from serve/docker.  [default for triton: "
    "NVIDIA's]",
)
@click.option(
    "--gpus", type=click.IntRange(0, 64), default=0, show_default=True, help="GPUs per replica; 0 runs it on a CPU."
)
@click.option("--cpus", type=click.IntRange(1, 256), default=2, show_default=True, help="CPU cores per replica.")
@click.option("--memory", default="2Gi", show_default=True, help="Memory per replica, as Kubernetes writes it.")
@replicas_option
@click.option("--service-account", help="Kubernetes service account with the credentials for the storage.")
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
    """Write Kubernetes resources for KServe.

    The resources are one InferenceService per model and the ServingRuntime that all of them use. With --runtime triton
    URI is the place to which you copied the output of `mpdsgr deploy triton` for the same bundles and the same --gpus.
    With --runtime mpdsgr it is the place of the bundles, each in a directory of its name. KServe reads addresses such
    as s3://BUCKET/PATH, gs://BUCKET/PATH and pvc://CLAIM/PATH.

    KServe 0.16 is required; several models on Triton require 0.17, and s3 or gs. A file in --out that you have edited
    is kept, and the command shows the difference.

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
@replicas_option
@click.option(
    "--gpu",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="GPUs per replica; 0.5 shares one between two.",
)
@click.option(
    "--backend", help="Runtime of the networks.  [default: onnxruntime-cuda with --gpu, else onnxruntime-cpu]"
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address on which every node listens.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port for HTTP.")
@click.option("--settings", type=FILE, help="TOML file with settings, as for `mpdsgr serve`.")
@overrides_option
@click.option(
    "--api-key-file",
    type=FILE,
    help="File of keys, one per line, of which clients must send one; it must exist on every node.",
)
@click.option("--insecure", is_flag=True, help="Allow a --host that other machines reach, without API keys.")
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
    """Write a configuration for Ray Serve.

    It describes one application, and each of its replicas serves all the models over HTTP, as `mpdsgr serve` does, but
    not over gRPC. On every node mpdsgr-deploy[ray,cpu] or mpdsgr-deploy[ray,gpu] must be installed, and the bundles and
    the file of keys must be at the same paths. For several nodes set --host 0.0.0.0. Protect Ray's own ports, because
    anyone who reaches them can run code.

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
    """Return the smallest and the largest number of N or MIN,MAX. Raises InputError for any other text."""
    numbers = number_list("--replicas", replicas, int, "1,4", low=0, counts=(1, 2))
    return numbers[0], numbers[-1]
