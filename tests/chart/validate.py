"""Holds YAML files against the schemas of Kubernetes, and against the resource definitions below k8s/crds.

validate.py VERSION[,VERSION] FILE...; prints what is wrong, and which kinds have no schema.
"""

import glob
import sys

import jsonschema
import kubernetes_validate
import yaml


def load(path):
    with open(path) as file:
        return [manifest for manifest in yaml.load_all(file, Loader=yaml.CSafeLoader) if manifest]


def plain(schema):
    """A definition's schema as JSON Schema, in which a field that it does not name is wrong."""
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: plain(field) for name, field in value.items()}
        elif key in ("items", "additionalProperties"):
            made[key] = plain(value)
        elif not key.startswith("x-"):
            made[key] = value
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if made.pop("nullable", False):
        return {"anyOf": [made, {"type": "null"}]}
    return made


def definitions():
    for path in glob.glob("k8s/crds/*.yaml"):
        for definition in load(path):
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = plain(version["schema"]["openAPIV3Schema"])
                schema["properties"].update({name: {} for name in ("apiVersion", "kind", "metadata")})
                yield (f"{spec['group']}/{version['name']}", spec["names"]["kind"]), schema


ours = dict(definitions())
unknown = set()
for path in sys.argv[2:]:
    for manifest in load(path):
        api, kind = manifest["apiVersion"], manifest["kind"]
        name = f"{kind} {manifest.get('metadata', {}).get('name')}"
        if (api, kind) in ours:
            for error in jsonschema.Draft202012Validator(ours[api, kind]).iter_errors(manifest):
                print(f"wrong {path}: {name}: {'/'.join(map(str, error.path))}: {error.message}")
            continue
        for version in sys.argv[1].split(","):
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.SchemaNotFoundError:
                unknown.add(f"unknown {api} {kind}")
            except kubernetes_validate.ValidationError as error:
                where = "/".join(str(part) for part in error.path)
                print(f"wrong {path}: {name}: {where}: {error.message} ({version})")
print("\n".join(sorted(unknown)))
