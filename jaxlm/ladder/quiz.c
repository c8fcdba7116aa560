// Runs the reader's sort on n numbers in some order: prints "sorted" or what
// is wrong, the number of comparisons, and the seconds it took.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static long count = 0;

int less(double a, double b) {
  count++;
  return a < b;
}

void sort(double *x, long n);

int main(int argc, char **argv) {
  long n = argc > 1 ? atol(argv[1]) : 0;
  const char *order = argc > 2 ? argv[2] : "random";
  double *x = malloc((n + 1) * sizeof(double)), sum = 0, after = 0;
  unsigned long state = 1;
  for (long i = 0; i < n; i++) {
    state = state * 6364136223846793005UL + 1442695040888963407UL;
    x[i] = strcmp(order, "sorted") == 0     ? (double)i
           : strcmp(order, "reversed") == 0 ? (double)(n - i)
           : strcmp(order, "equal") == 0    ? 1.0
                                            : (double)(state >> 33);
    sum += x[i];
  }
  clock_t begin = clock();
  sort(x, n);
  double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC;
  const char *state_of = "sorted";
  for (long i = 0; i < n; i++) {
    after += x[i];
    if (i > 0 && x[i] < x[i - 1]) state_of = "unsorted";
  }
  // Whole numbers below 2^31: their sum is exact, in any order.
  if (after != sum) state_of = "changed";
  printf("%s %ld %.3f\n", state_of, count, seconds);
  return 0;
}
