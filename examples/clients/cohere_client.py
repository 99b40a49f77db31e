"""Cohere's client, both versions of its API: the evaluator as a reranker.

SELFEVAL_URL=http://127.0.0.1:8000 SELFEVAL_TOKEN=... python cohere_client.py
"""

import json
import os

import cohere

URL, TOKEN = os.environ["SELFEVAL_URL"], os.environ["SELFEVAL_TOKEN"]
QUERY = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"
DOCUMENTS = ["3 - 2 = 1. The answer is 1.", "3 + 2 = 5. The answer is 5.", "Well, 6"]

asked = {"model": "evaluator", "query": QUERY, "documents": DOCUMENTS, "top_n": 2}
first = cohere.Client(api_key=TOKEN, base_url=URL).rerank(**asked, return_documents=True)
second = cohere.ClientV2(api_key=TOKEN, base_url=URL).rerank(**asked)
print(
    json.dumps(
        {
            "v1": [[result.index, result.relevance_score, result.document.text] for result in first.results],
            "v2": [[result.index, result.relevance_score] for result in second.results],
        }
    )
)
