"""Classify texts with trained models, linear ones.

python -m common.linear.predict RUN_DIR "a wonderful film, beautifully acted" "what a waste of time"
python -m common.linear.predict RUN_DIR < one_text_a_line.txt
"""

from common.program import start

if __name__ == "__main__":
    start("train")

    from common.inference import prediction

    prediction.main()
