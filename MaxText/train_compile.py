from maxtext_mudd.train_compile import run

if __name__ == "__main__":
  run()
