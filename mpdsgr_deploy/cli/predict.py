"""mpdsgr predict"""

import sys

import click

from mpdsgr_deploy.address import parse_address
from mpdsgr_deploy.cli.output import opened_bundle, precision_option, signature_option
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.prediction import Job
from mpdsgr_deploy.prediction.faults import place_of_faults
from mpdsgr_deploy.prediction.selection import parse_shard, read_list
from mpdsgr_deploy.prediction.writers import FORMATS
from mpdsgr_deploy.runtime.open import DEFAULT_BACKEND
from mpdsgr_deploy.signing.trust import required_trust
from mpdsgr_deploy.stores import Place, Stored, place_of


@click.command("predict")
@click.argument("bundle")
@click.argument("inputs", nargs=-1, type=place_of, metavar="[INPUTS]...")
@click.option(
    "--list", "listed", type=place_of, metavar="PATH", help="File with more INPUTS, one per line; - is stdin."
)
@click.option("--shard", metavar="I/N", default="1/1", help="Only share I of N, for machine I of N machines.")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What an input that cannot be read does: end the run, or be left out and named in OUT.skipped.csv.",
)
@click.option(
    "--backend", default=DEFAULT_BACKEND, show_default=True, help="What runs the network; on a GPU none has run yet."
)
@precision_option
@signature_option
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Images per inference.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="Processes that infer, each on a GPU of its own where there are some.  [default: 1; on Ray as fit]",
)
@click.option(
    "--ray", "cluster", metavar="ADDRESS", help="Run on the Ray cluster there, or with local on one of this machine."
)
@click.option("--ray-cpus", type=click.FloatRange(0), default=1.0, show_default=True, help="CPUs of a Ray actor.")
@click.option("--ray-gpus", type=click.FloatRange(0), default=0.0, show_default=True, help="GPUs of a Ray actor.")
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="How many labels an image gets.")
@click.option(
    "--out",
    type=place_of,
    metavar="PATH",
    help=f"{', '.join(FORMATS)} file to write, with --ray a folder.  [default: CSV on stdout]",
)
def command(
    bundle: str,
    inputs: tuple[Place, ...],
    listed: Place | None,
    shard: str,
    on_error: str,
    backend: str,
    precision: str | None,
    signature: str | None,
    batch: int,
    processes: int | None,
    cluster: str | None,
    ray_cpus: float,
    ray_gpus: float,
    top: int,
    out: Place | None,
) -> None:
    """Classify INPUTS with BUNDLE: images, folders of them, .npy, .npz and Parquet files, here or in a store.

    Arrays are uint8, or float32 in [0, 1], of shape [N, C, H, W]. Parquet files have a column of encoded images.
    INPUTS, --list and, with --ray, OUT may be addresses: s3://BUCKET/KEY, gs://BUCKET/KEY.

    Images are resized and centre cropped, transparent pixels laid on white. A network of event frames takes .bin
    recordings in place of images. A warning says if the pixels' mean or spread is far from that of the training images,
    as those of inverted digits are.

    CSV, JSON lines and Parquet hold an image's labels and their probabilities, best first: label and probability; with
    --top 2 the columns label_1, probability_1, label_2, probability_2, in JSON the lists labels and probabilities. .npz
    holds the names, logits and class numbers.

    With --out, what is finished lies in OUT.partial until all is. After a kill, a crash or a full disk the same command
    goes on there. An image that cannot be read ends the run in the same way: mend or remove it and run again, or leave
    such inputs out with --on-error skip. A batch too large for the memory is halved. Several machines share a job with
    --shard 1/N to N/N: their rows in this order are those of a single run, bit for bit.

    With --ray the job is shared by the machines of a Ray cluster, which all see BUNDLE, INPUTS and OUT under these
    names. OUT is then a folder of Parquet files with the rows of a single machine, bit for bit, and _SUCCESS at the
    end; after a kill the same command computes the parts that are missing.

    \b
    Example:
      mpdsgr predict bundles/digits photos/ --out labels.csv
      mpdsgr predict bundles/digits photos/ --ray auto --ray-gpus 0.5 --out labels/
      mpdsgr predict bundles/digits s3://photos/shards/ --ray auto --out s3://photos/labels
    """
    paths = [*inputs, *(read_list(listed) if listed else [])]
    if not paths:
        raise InputError("nothing to predict; give INPUTS, or a file that names them with --list")
    opened, chosen = opened_bundle(bundle, precision, required_trust(signature))
    job = Job(
        opened,
        paths,
        backend,
        chosen,
        batch,
        processes or 1,
        top,
        skip=on_error == "skip",
        shard=parse_shard(shard),
    )
    if cluster is not None:
        from mpdsgr_deploy.prediction.ray_data import Resources, predict_on_cluster

        if out is None:
            raise InputError("--ray writes a directory of Parquet files; name it with --out")
        address = parse_address(bundle)
        fetched = address if address.is_remote else None
        rows = predict_on_cluster(job, out, Resources(cluster, processes, ray_cpus, ray_gpus, fetched))
        click.echo(f"{rows} predictions in {out}")
        return
    if isinstance(out, Stored):
        raise InputError(f"--out {out}: only --ray writes to a store, with --ray local on this machine alone")
    if out is not None:
        count, skipped = job.to_file(out), place_of_faults(out)
        also = f"; what was skipped is in {skipped}" if skipped.exists() else ""
        click.echo(f"{count} predictions in {out}{also}")
        return
    job.to_stream(sys.stdout.buffer, ".csv")
