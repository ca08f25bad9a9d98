"""Check FocusNodeParser and FocusPrefill: exact offsets, budgets, names, pickling, pipelines."""

from __future__ import annotations

import itertools
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_index.core import Document
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.node_parser import NodeParser
from llama_index.core.schema import ImageDocument, MetadataMode, NodeRelationship, TextNode

from focus_core.errors import ConfigError
from focus_core.text.tokenization import TextTokenizer
from focus_integrations.llama_index import FocusNodeParser
from tests.conftest import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
PARSER = FocusNodeParser(TOKENIZER, chunk_size=24)
REPETITIVE = "the cat sat on the mat. " * 40
SCRIPTS = "漢字かな交じり文。🙂🙂 👩‍👩‍👧 naïve — русский текст\n\n" * 6


def exact(document, nodes):
    for node in nodes:
        assert document.text[node.start_char_idx : node.end_char_idx] == node.text != ""
    assert "".join(node.text for node in nodes) == document.text


def test_it_is_a_node_parser():
    """MRO: a pipeline and an index take it as what it is."""
    assert NodeParser.__name__ in [base.__name__ for base in FocusNodeParser.__mro__]
    assert FocusNodeParser.class_name() == "FocusNodeParser"


@pytest.mark.parametrize("text", [REPETITIVE, SCRIPTS, "one"])
def test_offsets_are_exact_and_nodes_tile_the_document(text):
    """document.text[start:end] == node.text for every node; LlamaIndex's own search finds other places."""
    document = Document(text=text, doc_id="d")
    nodes = PARSER.get_nodes_from_documents([document])
    exact(document, nodes)
    assert [node.start_char_idx for node in nodes] == sorted({node.start_char_idx for node in nodes})
    for before, after in itertools.pairwise(nodes):
        assert before.relationships[NodeRelationship.NEXT].node_id == after.node_id


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1, max_size=300), st.dictionaries(st.sampled_from("abc"), st.text(max_size=6), max_size=2))
def test_a_node_with_its_metadata_fits_a_chunk(text, metadata):
    """Counted by the tokenizer on the content that a model would read, for any text and metadata."""
    parser = FocusNodeParser(TOKENIZER, chunk_size=80)
    document = Document(text=text, doc_id="d", metadata=metadata)
    nodes = parser.get_nodes_from_documents([document])
    own = TextTokenizer(TOKENIZER)
    for node in nodes:
        assert len(own.encode(node.get_content(MetadataMode.LLM))) <= 80
        assert node.metadata == metadata
    if text.strip():
        exact(document, nodes)
    else:
        assert nodes == []


def test_metadata_that_fill_a_chunk_are_refused():
    """The message names the node and what to do; without metadata the document is cut."""
    document = Document(text=REPETITIVE, doc_id="d", metadata={"about": "the cat " * 40})
    with pytest.raises(ConfigError, match=r"metadata of 'd' leave 0 of 24 tokens .* excluded_llm_metadata_keys"):
        PARSER.get_nodes_from_documents([document])
    plain = FocusNodeParser(TOKENIZER, chunk_size=24, include_metadata=False)
    nodes = plain.get_nodes_from_documents([document])
    exact(document, nodes)
    assert nodes[0].metadata == {}


def test_names_depend_on_document_position_and_text():
    """The same twice; another document, another place or another text has another name."""
    first = PARSER.get_nodes_from_documents([Document(text=REPETITIVE, doc_id="d")])
    again = PARSER.get_nodes_from_documents([Document(text=REPETITIVE, doc_id="d")])
    other = PARSER.get_nodes_from_documents([Document(text=REPETITIVE, doc_id="e")])
    changed = PARSER.get_nodes_from_documents([Document(text="a " + REPETITIVE, doc_id="d")])
    ids = [node.node_id for node in first]
    assert ids == [node.node_id for node in again]
    assert len({*ids, *(node.node_id for node in other)}) == 2 * len(ids)
    assert changed[0].node_id != ids[0]
    own = FocusNodeParser(TOKENIZER, chunk_size=24, id_func=lambda i, doc: f"{doc.node_id}/{i}")
    assert own.get_nodes_from_documents([Document(text="one", doc_id="d")])[0].node_id == "d/0"


def test_it_pickles_and_round_trips_as_settings():
    """A parser from a pickle or from its settings cuts alike; other settings give another cache key."""
    document = Document(text=SCRIPTS, doc_id="d")
    ids = [node.node_id for node in PARSER.get_nodes_from_documents([document])]
    copy = pickle.loads(pickle.dumps(PARSER))
    assert [node.node_id for node in copy.get_nodes_from_documents([document])] == ids
    again = FocusNodeParser.from_dict(PARSER.to_dict(), tokenizer=TOKENIZER)
    assert again.to_dict() == PARSER.to_dict()
    assert FocusNodeParser(TOKENIZER, chunk_size=25).to_dict() != PARSER.to_dict()
    assert len(PARSER.tokenizer_hash) == 16


def test_sections_of_another_parser_keep_offsets_in_the_document():
    """Cutting a node that has a place in a document gives places in that document."""
    document = Document(text="# head\n\n" + REPETITIVE, doc_id="d")
    section = TextNode(text=REPETITIVE, start_char_idx=8, end_char_idx=len(document.text))
    section.relationships[NodeRelationship.SOURCE] = document.as_related_node_info()
    for node in PARSER([section]):
        assert document.text[node.start_char_idx : node.end_char_idx] == node.text
        assert node.ref_doc_id == "d"


def test_documents_without_text_give_no_nodes():
    """Empty, blank and image-only documents are passed over."""
    nothing = [Document(text=""), Document(text=" \n "), ImageDocument(image=b"x")]
    assert PARSER.get_nodes_from_documents(nothing) == []


def test_a_pipeline_caches_it():
    """Run twice with a cache, also in worker processes' manner: the nodes are the same."""
    cache = IngestionCache()
    documents = [Document(text=REPETITIVE, doc_id="d", metadata={"k": "v"})]
    first = IngestionPipeline(transformations=[PARSER], cache=cache).run(documents=documents)
    again = IngestionPipeline(transformations=[pickle.loads(pickle.dumps(PARSER))], cache=cache).run(
        documents=documents
    )
    assert [node.node_id for node in first] == [node.node_id for node in again]
    assert len(cache.cache.get_all(cache.collection)) == 1
