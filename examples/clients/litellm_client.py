"""LiteLLM: replies, a stream, embeddings and reranking.

SELFEVAL_URL=http://127.0.0.1:8000 SELFEVAL_TOKEN=... python litellm_client.py
"""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it is downloaded on import

import litellm

URL, TOKEN = os.environ["SELFEVAL_URL"], os.environ["SELFEVAL_TOKEN"]
QUESTION = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"
DOCUMENTS = ["3 - 2 = 1. The answer is 1.", "3 + 2 = 5. The answer is 5.", "Well, 6"]

server = {"api_base": f"{URL}/v1", "api_key": TOKEN}
asked = {"model": "openai/policy", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **server}
reply = litellm.completion(**asked)
stream = litellm.completion(**asked, stream=True)
vectors = litellm.embedding(model="openai/base", input=["pens"], encoding_format="float", **server)
ranked = litellm.rerank(model="cohere/evaluator", query=QUESTION, documents=DOCUMENTS, top_n=2, api_base=URL, api_key=TOKEN)
print(
    json.dumps(
        {
            "reply": reply.choices[0].message.content,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
            "dimensions": len(vectors.data[0]["embedding"]),
            "ranked": [[result["index"], result["relevance_score"]] for result in ranked.results],
        }
    )
)
