/* Keeps the kernel busy on every CPU: processes come and go, pipes are written, pages are faulted in. */
#include <sys/mman.h>
#include <sys/wait.h>

#include "planted.h"

#define PAGES 16

static void churn(void)
{
	int ends[2];
	char byte = 0;

	CHECK(pipe(ends) == 0);
	for (;;) {
		char *pages = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		pid_t child;

		CHECK(pages != MAP_FAILED);
		for (int i = 0; i < PAGES; i++)
			pages[i * 4096] = i;
		child = fork();
		CHECK(child >= 0);
		if (child == 0) {
			(void)!write(ends[1], &byte, 1);
			_exit(0);
		}
		CHECK(waitpid(child, NULL, 0) == child);
		CHECK(read(ends[0], &byte, 1) == 1);
		munmap(pages, PAGES * 4096);
	}
}

int main(int argc, char **argv)
{
	int processes = argc > 1 ? atoi(argv[1]) : 2;

	CHECK(processes >= 1);
	name_thread("kstub-load");
	/* All end with the first: the agent kills the group. */
	for (int i = 1; i < processes; i++)
		if (fork() == 0)
			churn();
	printf("pid=%d\nprocesses=%d\n", getpid(), processes);
	planted();
	churn();
}
