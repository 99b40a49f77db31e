"""LangChain: a reply, a stream, a batch and embeddings.

SELFEVAL_URL=http://127.0.0.1:8000 SELFEVAL_TOKEN=... python langchain_client.py
"""

import json
import os

from langchain_openai import ChatOpenAI, OpenAIEmbeddings

URL, TOKEN = os.environ["SELFEVAL_URL"], os.environ["SELFEVAL_TOKEN"]
QUESTION = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"

model = ChatOpenAI(model="policy", base_url=f"{URL}/v1", api_key=TOKEN, temperature=0)
# With check_embedding_ctx_length it would send token ids of an OpenAI model, which mean other words here.
embeddings = OpenAIEmbeddings(model="base", base_url=f"{URL}/v1", api_key=TOKEN, check_embedding_ctx_length=False)
print(
    json.dumps(
        {
            "reply": model.invoke(QUESTION).content,
            "streamed": "".join(chunk.content for chunk in model.stream(QUESTION)),
            "batch": [reply.content for reply in model.batch([QUESTION, QUESTION])],
            "dimensions": len(embeddings.embed_query("pens")),
        }
    )
)
