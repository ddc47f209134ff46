"""mpdsgr deploy: one subcommand an engine"""

from pathlib import Path
from typing import Any

import click

from mpdsgr_deploy.cli.output import json_option, print_json
from mpdsgr_deploy.serving.deploy import kserve as kserve_files
from mpdsgr_deploy.serving.deploy import triton as triton_files
from mpdsgr_deploy.serving.deploy.models import choose_models

bundles_argument = click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
out_option = click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
precision_option = click.option(
    "--precision", default="fp32", show_default=True, metavar="P,...", help="Which of each bundle's networks."
)


@click.group("deploy")
def command() -> None:
    """Write what other engines need to serve bundles.

    \b
    Example:
      mpdsgr deploy triton bundles/digits --out triton
      mpdsgr deploy kserve bundles/digits --out kserve --storage-uri s3://models/triton
    """


@command.command("triton")
@bundles_argument
@out_option
@precision_option
@click.option("--backend", default="onnxruntime", show_default=True, help="Triton's: onnxruntime or tensorrt.")
@click.option("--gpus", type=click.IntRange(0, 64), help="How many each model runs on; 0: a CPU.  [tensorrt: 1, else 0]")
@json_option
def triton(
    bundles: tuple[Path, ...], out: Path, precision: str, backend: str, gpus: int | None, as_json: bool
) -> None:
    """Write a Triton model repository: one model a bundle and precision.

    Models are called as `mpdsgr serve` calls them. With --backend tensorrt they are the engines that `mpdsgr build`
    put into the bundles; those for GPUs of different compute capability go side by side. --out is fresh or holds what
    this command wrote before.

    \b
    Example:
      mpdsgr deploy triton bundles/digits bundles/vgg11 --precision fp32,int8 --out triton
      mpdsgr deploy triton bundles/vgg11 --backend tensorrt --gpus 2 --out triton
    """
    count = gpus if gpus is not None else int(backend == "tensorrt")
    written = triton_files.write_repository(choose_models(bundles, _listed(precision)), out, backend, count)
    device = "--gpus all -e NVIDIA_TF32_OVERRIDE=0 " if count else ""  # TF32 would flip spikes
    following = (
        f"docker run --rm {device}-p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 -v {out.resolve()}:/models:ro "
        f"{triton_files.IMAGE} tritonserver --model-repository=/models"
    )
    if as_json:
        models = [{**model._asdict(), "noise": [entry.model_dump() for entry in model.noise]} for model in written]
        print_json({"repository": str(out), "models": models, "next": following})
        return
    for model in written:
        engines = [f"TensorRT {version} for {capability}" for capability, version in model.engines.items()]
        click.echo(f"{model.name}: {model.precision}, {' and '.join(engines) or 'ONNX'}, batches to {model.largest}")
        for entry in model.noise:
            drawn = "U[0, 1)" if entry.kind == "uniform" else "N(0, 1)"
            click.echo(f"  clients must also send {entry.name} FP32 [B, {', '.join(map(str, entry.shape))}] of {drawn}")
    click.echo(f"model repository in {out}; next: {following}")


@command.command("kserve")
@bundles_argument
@out_option
@click.option("--storage-uri", required=True, metavar="URI", help="Where the cluster finds what is served (see above).")
@precision_option
@click.option("--runtime", default="triton", show_default=True, help=f"What serves: {', '.join(kserve_files.RUNTIMES)}.")
@click.option("--image", help="Its container image.  [triton: NVIDIA's; mpdsgr: yours, from serve/docker]")
@click.option("--gpus", type=click.IntRange(0, 64), default=0, show_default=True, help="Of each replica; 0: a CPU.")
@json_option
def kserve(as_json: bool, bundles: tuple[Path, ...], precision: str, **options: Any) -> None:
    """Write KServe resources: one InferenceService a bundle and precision, and the ServingRuntime they use.

    With --runtime triton, URI is where you put what `mpdsgr deploy triton` wrote of the same bundles; with --runtime
    mpdsgr it is where the bundles themselves lie, each under its directory's name. It is a place that KServe reads,
    such as s3://BUCKET/PATH, gs://BUCKET/PATH or pvc://CLAIM/PATH. KServe 0.16 or newer.

    \b
    Example:
      mpdsgr deploy kserve bundles/digits --precision fp32,int8 --out kserve --storage-uri s3://models/triton
      mpdsgr deploy kserve bundles/digits --runtime mpdsgr --image mpdsgr-serve:cpu --out kserve \\
        --storage-uri pvc://bundles
    """
    out = options["out"]
    written = kserve_files.write_resources(choose_models(bundles, _listed(precision)), **options)
    if as_json:
        print_json({"directory": str(out), "files": written, "next": f"kubectl apply -f {out}"})
        return
    for name in written:
        click.echo(out / name)
    click.echo(f"resources in {out}; next: kubectl apply -f {out}")


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
