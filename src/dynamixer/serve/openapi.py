"""The OpenAPI description, written by hand; the tests hold the running server to it."""

from importlib.metadata import version
from typing import Any

from dynamixer.serve.body import FIELD, RAW_TYPES
from dynamixer.serve.settings import Settings

ENCODINGS = ("float16", "float32", "lists")
REFUSALS = {
    400: "The connection was closed too early, or the request is not HTTP.",
    401: "A token is asked for, and none or another was given.",
    403: "The request comes from a page of another site.",
    404: "There is no such thing.",
    405: "The method is not one that the address takes.",
    408: "The body did not arrive in time.",
    413: "The body or the picture is larger than what is accepted.",
    415: "The body's type or the picture's format is not one of those accepted.",
    421: "The server does not answer under this host name.",
    422: "The request or the picture cannot be used; the sentence says why.",
    429: "Too many requests are waiting.",
    500: "The server failed at the request; its log says how.",
    503: "Not ready, stopping, out of time or of memory.",
}
ALWAYS = (400, 401, 421)
WITH_PICTURE = (403, 408, 413, 415, 422, 429, 503)


def document(settings: Settings, classes: int) -> dict[str, Any]:
    """The description of a server with these settings."""
    paths = {
        "/v1/predict": {"post": _with_picture("The likeliest classes of a picture", "Prediction", [_top(classes)])},
        "/v1/mixing": {
            "post": _with_picture(
                "With which weights each row and column of tokens mixes for this picture",
                "Mixing",
                [_top(classes), _BLOCKS, _ENCODING, _VIEW],
            )
        },
        "/v1/model": {"get": _get("The model, its classes, preprocessing and blocks", "Model")},
        "/v1/average": {"get": _get("The matrices averaged over the samples", "Average", 404, 500, 503)},
        "/v1/samples": {"get": _get("Pictures to try", "Samples")},
        "/v1/samples/{number}": {
            "get": _operation("One of these pictures", {"application/octet-stream": {"schema": _BYTES}}, 404, 422)
            | {
                "parameters": [
                    {"name": "number", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 0}}
                ]
            }
        },
        "/healthz": {"get": _get("Whether the process answers", "Health") | {"security": []}},
        "/readyz": {
            "get": _get("Whether the warm-up inference matched its golden answer", "Status", 503) | {"security": []}
        },
        "/metrics": {"get": _operation("Figures for Prometheus", {"text/plain": {"schema": {"type": "string"}}})},
    }
    components: dict[str, Any] = {"schemas": _SCHEMAS}
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "dynamixer serve",
            "version": version("dynamixer"),
            "description": f"Pictures are JPEG, PNG, WebP or BMP, one frame, at most {settings.max_bytes:,} bytes and "
            f"{settings.max_pixels:,} pixels.",
        },
        "paths": paths,
        "components": components,
    }
    if settings.token is not None:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"token": []}]
    return described


_BYTES = {"type": "string", "format": "binary"}
_BLOCKS = {
    "name": "blocks", "in": "query", "description": "all, or numbers of blocks from 0 with commas between",
    "schema": {"type": "string", "pattern": "^(all|[0-9]{1,4}(,[0-9]{1,4})*)$", "default": "all"},
}  # fmt: skip
_ENCODING = {
    "name": "encoding", "in": "query",
    "description": "base64 of little-endian float16 or float32 in the order of the axes, or lists of numbers",
    "schema": {"type": "string", "enum": list(ENCODINGS), "default": "float16"},
}  # fmt: skip


_VIEW = {
    "name": "view", "in": "query", "description": "whether to send what the model saw, a JPEG as data URL",
    "schema": {"type": "boolean", "default": False},
}  # fmt: skip


def _top(classes: int) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": 100_000, "default": 5}
    return {"name": "top", "in": "query", "description": f"how many classes, of {classes}", "schema": schema}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _operation(summary: str, content: dict[str, Any], *refusals: int) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "Done", "content": content}}
    for status in sorted({*ALWAYS, *refusals}):
        responses[str(status)] = {
            "description": REFUSALS[status], "content": {"application/json": {"schema": _ref("Error")}}
        }  # fmt: skip
        if status in (429, 503):
            responses[str(status)]["headers"] = {
                "Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}
            }
    return {"summary": summary, "responses": responses}


def _get(summary: str, schema: str, *refusals: int) -> dict[str, Any]:
    return _operation(summary, {"application/json": {"schema": _ref(schema)}}, 422, *refusals)


def _with_picture(summary: str, schema: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": _BYTES} for kind in RAW_TYPES}
    content["multipart/form-data"] = {"schema": _object(**{FIELD: _BYTES})}
    return _get(summary, schema, *WITH_PICTURE) | {
        "parameters": parameters,
        "requestBody": {"required": True, "content": content},
    }


_STRING, _INTEGER, _NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_MATRICES = {
    "anyOf": [
        {"type": "null"},
        _object(shape={"type": "array", "items": _INTEGER, "minItems": 4, "maxItems": 4},
                data={"type": ["string", "array"]}),
    ]
}  # fmt: skip
_MIXING = {
    "model": _STRING,
    "encoding": {"enum": list(ENCODINGS)},
    "axes": {"const": ["line", "segment", "output", "input"]},
    "blocks": {"type": "array", "items": _ref("Block")},
}
_SCHEMAS: dict[str, Any] = {
    "Error": _object(error=_STRING),
    "Status": _object(status=_STRING),
    "Health": _object(status=_STRING, ready={"type": "boolean"}, reason={"type": ["string", "null"]}),
    "Guess": _object(label=_STRING, probability={"type": "number", "minimum": 0, "maximum": 1.0001}),
    "Prediction": _object(model=_STRING, top={"type": "array", "items": _ref("Guess"), "minItems": 1}),
    "Block": _object(
        block=_INTEGER, stage=_INTEGER, grid={"type": "array", "items": _INTEGER, "description": "rows, columns"},
        cell={"type": "array", "items": _NUMBER, "description": "a token's height and width, the picture's being 1"},
        branches={"anyOf": [{"type": "null"}, {"type": "object", "additionalProperties": _NUMBER}]},
        row=_MATRICES, column=_MATRICES,
    ),
    "Mixing": _object(
        top={"type": "array", "items": _ref("Guess")},
        view={"type": ["string", "null"]}, **_MIXING,
    ),
    "Average": _object(pictures=_INTEGER, **_MIXING),
    "Samples": _object(
        samples={"type": "array", "items": _object(number=_INTEGER, name=_STRING, thumbnail=_STRING)}, averaged=_INTEGER
    ),
    "Model": _object(
        model=_STRING, parameters=_INTEGER, classes={"type": "array", "items": _STRING}, preprocessing={"type": "object"},
        trained={"type": "object"}, mixing={"type": ["object", "null"]},
        shows_all={"type": "boolean", "description": "whether /v1/mixing gives all blocks in one answer"},
        blocks={"type": "array", "items": _object(block=_INTEGER, stage=_INTEGER, segments=_INTEGER, weights=_INTEGER)},
        limits={"type": "object"},
    ),
}  # fmt: skip
