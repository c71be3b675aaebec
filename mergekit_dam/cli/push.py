"""`mergekit-dam push`: publish a finished merge on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import click
from mergekit.options import PrettyPrintHelp

from mergekit_dam.cli.common import apply_quiet, existing_file, existing_folder, message, print_result, quiet_option


@click.command(cls=PrettyPrintHelp)
@click.argument("out_path", type=existing_folder)
@click.argument("repo_id", metavar="ORG/NAME")
@click.option("--public", is_flag=True, help="Create a public repository; without it, a private one.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of writing to the main branch.")
@click.option("--include-masks", is_flag=True, help="Publish dam_masks.safetensors, which others can apply again.")
@click.option("--license", "licence", help="Licence of the merge, e.g. apache-2.0; default: that of all inputs.")
@click.option(
    "--results",
    type=existing_file,
    help="JSON with measured accuracy and attack success; default: the results of `eval --save`.",
)
@click.option(
    "--card",
    type=existing_file,
    help="A README.md in place of the generated card, which --dry-run prints.",
)
@click.option("--dry-run", is_flag=True, help="Check, and print the card and the list of files; send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@quiet_option
def push(
    out_path: Path,
    repo_id: str,
    public: bool,
    create_pr: bool,
    include_masks: bool,
    licence: str | None,
    results: Path | None,
    card: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Publish a finished merge on the Hub, with a model card; private unless --public is given.

    The token comes from HF_TOKEN or `hf auth login`, and HF_ENDPOINT names another Hub. The merge is checked before it
    is sent, and compared with the files on the Hub afterwards. Paths of this machine are not sent: of models and data
    on this disk only the names of their folders are.

    \b
    Example:
        mergekit-dam push out ORG/NAME --dry-run
        mergekit-dam push out ORG/NAME --license apache-2.0
    """
    from mergekit_dam.publish.push import plan_push
    from mergekit_dam.publish.push import push as send

    apply_quiet(quiet)
    plan = plan_push(
        out_path,
        repo_id,
        public=public,
        create_pr=create_pr,
        include_masks=include_masks,
        licence=licence,
        results=results,
        card=card,
    )
    for warning in plan.warnings:
        message(f"push: {warning}", quiet=quiet)
    message(f"push: {len(plan.files) + 1} files, {plan.size / 1e6:,.1f} MB, to {repo_id}", quiet=quiet)
    if dry_run:
        files = {name: path.stat().st_size for name, path in plan.files.items()}
        if as_json:
            click.echo(json.dumps({"repo_id": repo_id, "public": public, "files": files, "card": plan.card}, indent=2))
        else:
            for name, size in files.items():
                message(f"{size:>14,}  {name}", quiet=quiet)
            print_result(plan.card.rstrip("\n"), quiet=quiet)
        return
    done = send(plan)
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=2))
    else:
        print_result(done.pull_request or done.url, quiet=quiet)
