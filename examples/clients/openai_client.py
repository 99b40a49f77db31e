"""OpenAI's client: replies, a stream, the best of several, and embeddings.

SELFEVAL_URL=http://127.0.0.1:8000 SELFEVAL_TOKEN=... python openai_client.py
"""

import json
import os

from openai import OpenAI

URL, TOKEN = os.environ["SELFEVAL_URL"], os.environ["SELFEVAL_TOKEN"]
MESSAGES = [{"role": "user", "content": "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"}]

client = OpenAI(base_url=f"{URL}/v1", api_key=TOKEN)
reply = client.chat.completions.create(model="policy", messages=MESSAGES, temperature=0)
stream = client.chat.completions.create(model="policy", messages=MESSAGES, temperature=0, stream=True)
best = client.chat.completions.create(model="policy", messages=MESSAGES, seed=1, extra_body={"best_of": 4})
vectors = client.embeddings.create(model="base", input=["pens", "pencils"])
print(
    json.dumps(
        {
            "models": [model.id for model in client.models.list()],
            "reply": reply.choices[0].message.content,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
            "best": best.choices[0].message.content,
            "score": best.choices[0].score,
            "confidence": best.choices[0].confidence,
            "dimensions": len(vectors.data[0].embedding),
        }
    )
)
