"""`dynamixer push`."""

import click

from dynamixer.cli.common import EXIT_CODES, json_option, print_result


@click.command(epilog=EXIT_CODES)
@click.argument("model")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository that only its owner sees.")
@click.option("--license", metavar="ID", default="apache-2.0", show_default=True, help="Licence of the weights.")
@click.option("--message", metavar="TEXT", default="Add the model", show_default=True, help="Of the commit.")
@json_option
def push(model: str, repository: str, private: bool, license: str, message: str, as_json: bool) -> None:
    """Upload MODEL, a run folder or checkpoint, to the Hugging Face hub as OWNER/NAME, with a model card.

    \b
      dynamixer export runs/first --format hub --out look      look first at what would be uploaded
      dynamixer push runs/first me/flowers --private
      dynamixer predict rose.jpg --model hf-hub:me/flowers

    Log in with `hf auth login`, or set HF_TOKEN. timm and other programs read what is uploaded; a card that is already there
    is kept.
    """
    from dynamixer.hub import push as run  # noqa: PLC0415

    url = run(model, repository, private=private, license=license, message=message)
    print_result(as_json, {"url": url, "repository": repository}, url)
