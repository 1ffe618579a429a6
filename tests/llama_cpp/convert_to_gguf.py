"""Run llama.cpp's converter for a checkpoint with a tokenizer of its own: `convert_to_gguf.py LLAMA_CPP FOLDER OUT`.

It tells pre-tokenizers apart by a hash over the tokens of one text, which depends on the vocabulary, and refuses
a vocabulary that it has not seen. The tests' tokenizers are Qwen2's with fewer tokens, which is said here.
"""

import sys


def main():
    llama_cpp, folder, out = sys.argv[1:]
    sys.path.insert(0, llama_cpp)
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32"]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
