"""`dynamixer models`."""

import fnmatch

import click

from dynamixer.cli.common import EXIT_CODES, json_option, print_result


@click.command(epilog=EXIT_CODES)
@click.argument("pattern", default="*")
@json_option
def models(pattern: str, as_json: bool) -> None:
    """List the models with their size and work, those of plug-ins included; PATTERN such as '*_s' chooses.

    Where weights ship, it says with which accuracy on which test pictures.
    """
    import timm  # noqa: PLC0415
    import torch  # noqa: PLC0415

    import dynamixer  # noqa: PLC0415
    from dynamixer.data.preprocess import native_size  # noqa: PLC0415
    from dynamixer.errors import UserError, did_you_mean  # noqa: PLC0415
    from dynamixer.logs import log  # noqa: PLC0415
    from dynamixer.models import count  # noqa: PLC0415
    from dynamixer.models.checkpoint import create_model, load  # noqa: PLC0415
    from dynamixer.models.shipped import shipped  # noqa: PLC0415

    known = [*timm.list_models(module="dynamixer"), *dynamixer.plugin_models]
    names = sorted(set(fnmatch.filter(known, pattern)))
    if not names:
        raise UserError(f"no model matches {pattern!r}: {did_you_mean(pattern, known)}")
    rows = []
    for name in names:
        try:
            with torch.device("meta"):
                model = create_model(name)
            parameters, multiply_adds = count(model)
            size = native_size(model)[0]
        except Exception as error:  # of a plug-in's model
            log(f"{name} cannot be counted: {type(error).__name__}: {error}")
            continue
        about = (timm.model_entrypoint(name).__doc__ or "").strip().partition("\n")[0]
        trained = {} if shipped(name) is None else load(name).trained
        weights = {"data": trained["data"], "top1": trained["test"]["top1"]} if trained else None
        numbers = {"parameters": parameters, "multiply_adds": multiply_adds, "size": size}
        rows.append({"model": name, **numbers, "about": about, "weights": weights})
    rows.sort(key=lambda row: row["parameters"])
    head = f"{'model':20}{'parameters':>12}{'multiply-adds':>16}{'pixels':>8}  about"
    text = [
        f"{r['model']:20}{r['parameters']:12,}{r['multiply_adds']:16,}{r['size']:8}  {r['about']}"
        + (f" Weights ship: {w['top1']:.2f} %, {w['data']}." if (w := r["weights"]) else "")
        for r in rows
    ]
    print_result(as_json, {"models": rows}, "\n".join([head, *text]))
