"""Commands on the store."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from flows.figures import size
from flows.terminal import OUT, print_json, print_table
from pipeline import upkeep
from pipeline.artifacts import Artifact, Store
from pipeline.checkpoint import read_json
from pipeline.manifest import MANIFEST

app = App(name="artifacts", help="List, show, check, promote and remove what the store holds.", group="The store")
Json = Annotated[bool, Parameter(name="--json", negative="")]


@app.command(name="list")
def list_(name: str | None = None, *, store: str = "artifacts", json: Json = False) -> None:
    """List every version, or those of one name.

    Parameters
    ----------
    name
        A model's name in the store.
    store
        The store's folder.
    json
        Print one JSON document.

    """
    held = Store.open(store)
    found = [artifact for artifact in held.artifacts() if name in (None, artifact.manifest.name)]
    rows = [
        {
            "reference": artifact.reference,
            "stage": artifact.manifest.stage,
            "size": size(artifact.manifest.nbytes),
            "created": artifact.manifest.created,
            "aliases": ", ".join(_aliases(held, artifact)),
        }
        for artifact in found
    ]
    if json:
        print_json({"artifacts": rows})
    elif rows:
        print_table(str(held.root), rows)
    else:
        OUT.print(f"{held.root} holds no artifact" + (f" of {name}" if name else ""), markup=False, soft_wrap=True)


@app.command
def show(reference: str, *, store: str = "artifacts") -> None:
    """Print the manifest of a version: parents, options, data, metrics, software, files, digests.

    Parameters
    ----------
    reference
        name/variant[@version|alias].
    store
        The store's folder.

    """
    artifact = Store.open(store).resolve(reference)
    print_json({"reference": artifact.reference, "path": str(artifact.path), **read_json(artifact.path / MANIFEST)})


@app.command
def lineage(reference: str, *, store: str = "artifacts", json: Json = False) -> None:
    """Show what a version was made from, back to the source.

    Parameters
    ----------
    reference
        name/variant[@version|alias].
    store
        The store's folder.
    json
        Print one JSON document.

    """
    held = Store.open(store)
    rows = list(upkeep.lineage(held, held.resolve(reference)))
    if json:
        print_json([{"depth": depth, "role": role, "reference": found} for depth, role, found in rows])
        return
    for depth, role, found in rows:
        OUT.print(f"{'   ' * depth}{role + ': ' if role else ''}{found}", markup=False, soft_wrap=True)


@app.command
def verify(reference: str | None = None, *, store: str = "artifacts") -> None:
    """Hash every file of a version, or of all versions, against its manifest.

    Parameters
    ----------
    reference
        name/variant[@version|alias]; every version where it is left out.
    store
        The store's folder.

    """
    held = Store.open(store)
    for artifact in [held.resolve(reference)] if reference else held.artifacts():
        upkeep.verify(artifact)
        OUT.print(
            f"{artifact.reference}: {len(artifact.manifest.files)} files as committed", markup=False, soft_wrap=True
        )


@app.command
def promote(reference: str, alias: str = "production", *, store: str = "artifacts") -> None:
    """Point an alias at a version, whatever its gates said.

    Parameters
    ----------
    reference
        name/variant@version.
    alias
        The alias to move.
    store
        The store's folder.

    """
    held = Store.open(store)
    artifact = held.resolve(reference)
    held.set_alias(artifact, alias)
    OUT.print(f"{artifact.manifest.name}/{artifact.manifest.variant}@{alias} is now {artifact.version}", markup=False)


@app.command
def rm(reference: str, *, store: str = "artifacts") -> None:
    """Remove a version that no alias points at.

    Parameters
    ----------
    reference
        name/variant@version.
    store
        The store's folder.

    """
    held = Store.open(store)
    artifact = held.resolve(reference)
    upkeep.remove(held, artifact)
    OUT.print(f"removed {artifact.reference}; requant artifacts gc gives its disk space back", markup=False)


@app.command
def gc(*, keep: int | None = None, store: str = "artifacts", json: Json = False) -> None:
    """Remove files that no version holds, and with --keep N all but each variant's newest N versions.

    Versions with an alias stay, and so do the ancestors of what stays.

    Parameters
    ----------
    keep
        How many versions of each variant stay.
    store
        The store's folder.
    json
        Print one JSON document.

    """
    done = upkeep.collect(Store.open(store), keep=keep)
    if json:
        print_json({"versions": list(done.versions), "files": done.files, "bytes": done.nbytes})
        return
    for reference in done.versions:
        OUT.print(f"removed {reference}", markup=False)
    OUT.print(f"removed {len(done.versions)} versions and {done.files} files, {size(done.nbytes)}", markup=False)


def _aliases(store: Store, artifact: Artifact) -> list[str]:
    aliases = store.aliases(artifact.manifest.name, artifact.manifest.variant)
    return [alias for alias, version in aliases.items() if version == artifact.version]
