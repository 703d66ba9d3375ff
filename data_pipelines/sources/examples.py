"""Records that are a serialized tf.train.Example, as TFDS and most TensorFlow data sets store them, without TensorFlow.

    Example { features: map<string, Feature> }     Feature = list of bytes | list of float | list of int64

The message types are built here with protobuf, in a pool of their own: TensorFlow registers the same names in the default
pool.

The image of a record is the feature `image` or the like (see `IMAGE_FEATURES`), else the only feature that begins as an image
file does. Every other feature becomes a field: bytes decoded as text, one value by itself, several as a list. The feature
`json` is an object whose entries are fields too, as in tars; `writing` stores there what no feature can hold.

The trap: on the wire, a feature without a value and a missing feature are the same; neither becomes a field.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

from data_pipelines.errors import UserError
from data_pipelines.records import Pair
from data_pipelines.sources import tfds
from data_pipelines.sources.columns import parse_object

IMAGE_FEATURES = ("image", "image/encoded", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "image_raw")
KEY_FEATURES = ("__key__", "tfds_id", "image/filename", "id")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")
LOOKED_AT_RECORDS = 100
_LISTS = {
    "bytes_list": ("BytesList", "TYPE_BYTES"),
    "float_list": ("FloatList", "TYPE_FLOAT"),
    "int64_list": ("Int64List", "TYPE_INT64"),
}


@functools.cache
def _example_class() -> type:
    """The message class, wire compatible with tensorflow/core/example/example.proto."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    proto = descriptor_pb2.FieldDescriptorProto
    one, many = proto.LABEL_OPTIONAL, proto.LABEL_REPEATED
    file = descriptor_pb2.FileDescriptorProto(
        name="data_pipelines/example.proto", package="data_pipelines", syntax="proto3"
    )

    def of(message: str) -> dict:
        return {"type": proto.TYPE_MESSAGE, "type_name": f".data_pipelines.{message}"}

    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, (message, kind)) in enumerate(_LISTS.items(), 1):
        file.message_type.add(name=message).field.add(name="value", number=1, type=getattr(proto, kind), label=many)
        feature.field.add(name=name, number=number, label=one, oneof_index=0, **of(message))
    features = file.message_type.add(name="Features")
    features.field.add(name="feature", number=1, label=many, **of("Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry", options={"map_entry": True})
    entry.field.add(name="key", number=1, label=one, type=proto.TYPE_STRING)
    entry.field.add(name="value", number=2, label=one, **of("Feature"))
    file.message_type.add(name="Example").field.add(name="features", number=1, label=one, **of("Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("data_pipelines.Example"))


def parse(record: bytes) -> dict[str, list]:
    """The values of each feature. Raises UserError if the record is not a tf.train.Example."""
    from google.protobuf.message import DecodeError

    try:
        example = _example_class().FromString(record)
    except DecodeError as error:
        raise UserError(f"a record of {len(record)} bytes is not a tf.train.Example ({error})") from error
    features = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        features[name] = list(getattr(feature, kind).value) if kind else []
    return features


def parse_first(read: Callable[[int], bytes], records: int) -> dict[str, list]:
    """The features of the first record that can be read. Raises what its reader or `parse` does if none of some can."""
    failed: Exception | None = None
    for number in range(min(records, LOOKED_AT_RECORDS)):
        try:
            return parse(read(number))
        except (RuntimeError, ValueError) as error:
            failed = failed or error
    raise failed or UserError("there is none")


def serialize(features: Mapping[str, Sequence]) -> bytes:
    """A record of lists of bytes, str, int or float; equal features give equal bytes."""
    example = _example_class()()
    for name, values in features.items():
        feature = example.features.feature[name]
        if all(isinstance(value, bytes | str) for value in values):
            feature.bytes_list.value.extend(value.encode() if isinstance(value, str) else value for value in values)
        elif all(isinstance(value, int) for value in values):
            feature.int64_list.value.extend(values)
        else:
            feature.float_list.value.extend(values)
    return example.SerializeToString(deterministic=True)


def image_feature(features: Mapping[str, list]) -> str | None:
    """The name of the feature that holds the image, found from one record."""
    blobs = {name: values[0] for name, values in features.items() if len(values) == 1 and isinstance(values[0], bytes)}
    named = next((name for name in IMAGE_FEATURES if name in blobs), None)
    shown = [name for name, blob in blobs.items() if _is_image(blob)]
    return named or (shown[0] if len(shown) == 1 else None)


def notes(shard: str, first: Mapping[str, list], records: int) -> dict[str, object]:
    """The notes of an index: the features of the first record, which one is the image, and whether records are missing."""
    names, image = sorted(first), tfds.image_feature(shard) or image_feature(first)
    found = {"columns": None if "json" in first else names, "features": names, "image": image}
    due = tfds.records_due(shard)
    return found | ({"truncated": True, "pairs_due": due} if due is not None and due > records else {})


def to_pair(features: Mapping[str, list], *, image: str, fallback_key: str) -> Pair:
    """The pair in the features of a record. image: the name of the feature that holds the image."""
    fields, problems = {}, []
    for name, values in features.items():
        if name in (image, "json") or not values:
            continue
        if isinstance(values[0], bytes):
            if _is_image(values[0]):
                continue  # a mask, a second view
            try:
                values = [value.decode("utf-8") for value in values]
            except UnicodeDecodeError:
                problems.append("invalid_utf8")
                continue
        fields[name] = values if len(values) > 1 else values[0]
    key = fields.pop("key", None)
    if features.get("json"):
        entry = features["json"][0]
        parsed, found = parse_object(entry if isinstance(entry, bytes) else b"")
        fields, problems = parsed | fields, problems + found
    if not isinstance(key, str | int):
        key = next((fields[name] for name in KEY_FEATURES if isinstance(fields.get(name), str | int)), fallback_key)
    images = features.get(image)
    return Pair(str(key), images[0] if images else None, fields, tuple(dict.fromkeys(problems)))


def _is_image(blob: bytes) -> bool:
    return blob.startswith(_MAGIC) or (blob[:4] == b"RIFF" and blob[8:12] == b"WEBP")
