"""What people took, as vectors read from a real database."""

from __future__ import annotations

import numpy as np
import psycopg
import pytest
from pgvector import Vector
from pgvector.psycopg import register_vector

from orchestration.compute.drift.vectors import person_vectors
from schemas.ranker import TEXT_DIM


def test_a_persons_vector_is_the_mean_of_the_texts_that_have_one(connection: psycopg.Connection) -> None:
    register_vector(connection)
    vectors = np.eye(2, TEXT_DIM, dtype=np.float32)
    for number, vector in enumerate(vectors):
        connection.execute("INSERT INTO items (item_id, title) VALUES (%s, 'a title')", (f"i{number}",))
        connection.execute(
            "INSERT INTO text_vectors (item_id, text_hash, vector) VALUES (%s, 'h', %s)", (f"i{number}", Vector(vector))
        )
    found = person_vectors(connection, {"u1": ["i0", "i1", "unknown"], "u2": ["unknown"], "u3": ["i1"]})
    assert found == pytest.approx(np.stack([vectors.mean(axis=0), vectors[1]]))
