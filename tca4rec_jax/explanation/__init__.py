"""Why a list is as it is: the decoding tree with the LLM's, the CF model's and mixed shares."""
