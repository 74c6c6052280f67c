"""What turns patches and texts into unit embeddings of one space, and the cache of the results.

Two teachers: CLIP through open_clip, and a bundled EfficientNet-Lite0, which is not CLIP. A teacher
runs once per video; training reads its embeddings from the cache and never loads it.
"""

from hnerv_clip.teachers.base import (
    Teacher,
    TeacherFacts,
    describe_teacher,
    preprocess,
    teacher_dim,
)
from hnerv_clip.teachers.cache import cache_path, cached_embeddings, teacher_embeddings
from hnerv_clip.teachers.load import load_teacher, run_teacher
from hnerv_clip.teachers.text import encode_queries, parse_queries

__all__ = ["Teacher", "TeacherFacts", "cache_path", "cached_embeddings", "describe_teacher",
           "encode_queries", "load_teacher", "parse_queries", "preprocess", "run_teacher",
           "teacher_dim", "teacher_embeddings"]
