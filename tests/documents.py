"""Documents of LlamaIndex that several files of tests load."""

from llama_index.core import Document

from conftest import TEXT

DOCUMENTS = [
    Document(text="The keeper is Oriel. " * 6, metadata={"file_name": "a.txt"}, doc_id="a"),
    Document(text=TEXT, metadata={"file_name": "b.txt", "page": 2}, doc_id="b"),
]
THIRD = Document(text="The boat is green. " * 8, metadata={"file_name": "c.txt"}, doc_id="c")
