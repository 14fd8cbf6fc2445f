"""``eqcvt doctor`` and ``eqcvt models``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from eqcvt.cli.app import app, console

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def doctor(*, as_json: JsonOption = False) -> None:
    """Show versions, devices, threads, and which backend each op takes and why."""
    from eqcvt.doctor import report

    found = report()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    out = console()
    about = Table("what", "found", title="Versions", title_justify="left")
    for package, version in found["versions"].items():
        about.add_row(package, version or "not installed")
    out.print(about)
    for extra, missing in found["extras"].items():
        if missing:
            line = f'extra {extra}: {", ".join(missing)} missing; pip install "eqcvt[{extra}]"'
            out.print(line, markup=False, soft_wrap=True)
    devices = Table("device", "name", "details", title="Devices", title_justify="left")
    for device in found["devices"]:
        devices.add_row(device["device"], device["name"], _details(device))
    out.print(devices)
    threads = found["threads"]
    out.print(
        f"threads: torch uses {threads['torch']} of {threads['usable_cores']} usable cores "
        f"({threads['cores']} in the machine)"
    )
    for name, value in found["variables"].items():
        out.print(f"{name}={value}", markup=False)
    out.print(f"native extension: {_state(found['native'])}", markup=False, soft_wrap=True)
    for proof in found["proofs"]:
        line = f"GPU kernels proven on {proof['device']}: {proof['file']}: {proof['state']}"
        out.print(line, markup=False, soft_wrap=True)
    backends = Table("op", "device", "backend", "chosen", "why", title="Backends")
    backends.title_justify = "left"
    for row in found["backends"]:
        yes = "the first that can" if found["backend"] == "auto" else "asked for"
        why = row["reason"] or (yes if row["chosen"] else "another comes first")
        backends.add_row(
            row["op"], row["device"], row["backend"], "yes" if row["chosen"] else "no", why
        )
    out.print(backends)


def _state(native: dict[str, Any]) -> str:
    """Return what was built of the compiled extension, and what of it is used here."""
    if not native["built"]:
        return f"none: {native['reason']}"
    cuda = "without CUDA"
    if native["cuda"]:
        cuda = f"with CUDA {native['cuda']} for {native['cuda_archs']}"
    return (
        f"{native['version']}, built by {native['compiler']} for "
        f"{', '.join(native['instruction_sets'])} (takes {native['instruction_set']}), {cuda}"
    )


def _details(device: dict[str, Any]) -> str:
    """Return the fields of a device beyond its name, memory in GiB."""
    parts = [str(device["capability"])]
    if "memory_bytes" in device:
        parts += [f"{device['memory_bytes'] / 2**30:.1f} GiB"]
        parts += ["bf16" if device["bf16"] else "no bf16"]
    return ", ".join(parts)


@app.command()
def models(
    *,
    channels: Annotated[int, typer.Option(min=1, help="Channels of the images.")] = 1,
    classes: Annotated[int, typer.Option(min=1, help="Number of classes.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """List the registered models with their parameter counts."""
    import eqcvt

    rows: list[dict[str, Any]] = []
    for name in eqcvt.list_models():
        model = eqcvt.create_model(name, in_channels=channels, num_classes=classes)
        count = sum(p.numel() for p in model.parameters())
        rows.append({"name": name, "parameters": count, "config": dict(model.config)})
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("model", "class", title=f"{channels} channel(s), {classes} classes")
    table.add_column("parameters", justify="right")
    table.add_column("group")
    table.add_column("invariance")
    for row in rows:
        config = row["config"]
        table.add_row(
            row["name"],
            config["architecture"],
            f"{row['parameters']:,}",
            str(config.get("group", "-")),
            str(config.get("invariance", "-")),
        )
    console().print(table)
