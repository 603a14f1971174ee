"""Holds YAML files against the schemas of Kubernetes: validate.py VERSION[,VERSION] FILE...; prints what is wrong, and which kinds have no schema."""

import sys

import kubernetes_validate
import yaml

unknown = set()
for path in sys.argv[2:]:
    with open(path) as file:
        for manifest in filter(None, yaml.load_all(file, Loader=yaml.CSafeLoader)):
            name = f"{manifest['kind']} {manifest.get('metadata', {}).get('name')}"
            for version in sys.argv[1].split(","):
                try:
                    kubernetes_validate.validate(manifest, version, strict=True)
                except kubernetes_validate.SchemaNotFoundError:
                    unknown.add(f"unknown {manifest['apiVersion']} {manifest['kind']}")
                except kubernetes_validate.ValidationError as error:
                    where = "/".join(str(part) for part in error.path)
                    print(f"wrong {path}: {name}: {where}: {error.message} ({version})")
print("\n".join(sorted(unknown)))
