"""mpdsgr predict"""

import sys

import click

from mpdsgr_deploy.address import parse_address
from mpdsgr_deploy.cli.backend_option import backend_option
from mpdsgr_deploy.cli.ignored import refuse_ignored
from mpdsgr_deploy.cli.output import opened_bundle, precision_option, signature_option
from mpdsgr_deploy.errors import InputError
from mpdsgr_deploy.prediction import Job
from mpdsgr_deploy.prediction.faults import place_of_faults
from mpdsgr_deploy.prediction.inputs import read_list
from mpdsgr_deploy.prediction.stream import parse_shard
from mpdsgr_deploy.prediction.writers import FORMATS
from mpdsgr_deploy.signing.trust import required_trust
from mpdsgr_deploy.stores import Place, Stored, place_of


@click.command("predict")
@click.argument("bundle")
@click.argument("inputs", nargs=-1, type=place_of, metavar="[INPUTS]...")
@click.option(
    "--list", "listed", type=place_of, metavar="PATH", help="File with more INPUTS, one per line; - reads stdin."
)
@click.option(
    "--shard", metavar="I/N", default="1/1", help="Classify only part I of N, to divide the work among N machines."
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="What to do with an input that cannot be read: stop the run, or skip it and list it in OUT.skipped.csv.",
)
@backend_option
@precision_option
@signature_option
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Images per inference.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="Number of processes that run the network, each on its own GPU if there are GPUs.  [default: 1; with --ray as "
    "many as the cluster has room for]",
)
@click.option(
    "--ray",
    "cluster",
    metavar="ADDRESS",
    help="Run on the Ray cluster at ADDRESS: HOST:PORT, auto, or local for a new one on this machine.",
)
@click.option("--ray-cpus", type=click.FloatRange(0), default=1.0, show_default=True, help="CPUs for each Ray actor.")
@click.option(
    "--ray-gpus", type=click.FloatRange(0), default=0.0, show_default=True, help="GPUs for each Ray actor, such as 0.5."
)
@click.option(
    "--top",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of labels to write per image, the most probable first.",
)
@click.option(
    "--out",
    type=place_of,
    metavar="PATH",
    help=f"File to write, ending in {', '.join(FORMATS)}; with --ray a directory.  [default: CSV on stdout]",
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
    """Classify images with a bundle's network.

    INPUTS are image files, folders of them, .npy and .npz files with an array [N, C, H, W] of uint8 or of float32 in
    [0, 1], and Parquet files with a column of encoded images. INPUTS, --list and, with --ray, OUT may be addresses in
    an object store: s3://BUCKET/KEY or gs://BUCKET/KEY.

    Images are resized and cropped at the centre; transparent pixels become white. A network for event frames takes
    .bin recordings instead of images. A warning appears if the mean or the spread of the pixels is far from that of
    the training images, for example if black and white are exchanged.

    CSV, JSON lines and Parquet hold each image's label and its probability. With --top 2 the columns are label_1,
    probability_1, label_2 and probability_2, and JSON has the lists labels and probabilities. .npz holds the names of
    the inputs, the logits and the class numbers.

    While the command runs, finished results are in OUT.partial. After an interruption, a crash or a full disk run the
    same command again, and it continues from there. An image that cannot be read also stops the run: repair or remove
    it and run the command again, or use --on-error skip. A batch that is too large for the memory is halved. With
    --shard 1/N to N/N several machines share the work; their files in this order equal the file of a single run, bit
    for bit.

    With --ray the machines of a Ray cluster share the work. BUNDLE, INPUTS and OUT must be at the same paths on all of
    them. OUT becomes a directory of Parquet files, whose rows equal those of a single machine bit for bit, and gets the
    file _SUCCESS at the end. After an interruption the same command computes only the missing parts.

    \b
    Example:
      mpdsgr predict bundles/digits photos/ --out labels.csv
      mpdsgr predict bundles/digits photos/ --ray auto --ray-gpus 0.5 --out labels/
      mpdsgr predict bundles/digits s3://photos/shards/ --ray auto --out s3://photos/labels
    """
    if cluster is None:
        refuse_ignored("mpdsgr predict without --ray", "ray_cpus", "ray_gpus")
    paths = [*inputs, *(read_list(listed) if listed else [])]
    if not paths:
        raise InputError("there is nothing to classify; give INPUTS, or --list with a file that names them")
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
        raise InputError(
            f"--out {out} is in an object store, to which only --ray writes; add --ray local to use just this machine"
        )
    if out is not None:
        count, skipped = job.to_file(out), place_of_faults(out)
        also = f"; skipped inputs are listed in {skipped}" if skipped.exists() else ""
        click.echo(f"{count} predictions in {out}{also}")
        return
    job.to_stream(sys.stdout.buffer, ".csv")
